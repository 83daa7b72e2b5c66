"""The backbone families, one file each. ``FAMILIES`` is the list of them: everything else in the house goes by it."""

from mmvmamba.models.backbones.base import BaseBackbone
from mmvmamba.models.backbones.efficientvmamba import EfficientVMamba, EfficientVMambaArch
from mmvmamba.models.backbones.mambaout import MambaOut, MambaOutArch
from mmvmamba.models.backbones.msvmamba import MSVMamba, MSVMambaArch
from mmvmamba.models.backbones.plainmamba import PlainMamba, PlainMambaArch
from mmvmamba.models.backbones.shufflemamba import ShuffleMamba, ShuffleMambaArch
from mmvmamba.models.backbones.vim import Vim, VimArch
from mmvmamba.models.backbones.vmamba import VMamba, VMambaArch
from mmvmamba.models.backbones.vssd import VSSD, VSSDArch

#: Name of a family, which is that of its modules here and in ``mmvmamba.converters``, and its class.
FAMILIES: dict[str, type[BaseBackbone]] = {
    "vmamba": VMamba,
    "msvmamba": MSVMamba,
    "efficientvmamba": EfficientVMamba,
    "vssd": VSSD,
    "mambaout": MambaOut,
    "vim": Vim,
    "plainmamba": PlainMamba,
    "shufflemamba": ShuffleMamba,
}

__all__ = [
    "FAMILIES",
    "VSSD",
    "EfficientVMamba",
    "EfficientVMambaArch",
    "MSVMamba",
    "MSVMambaArch",
    "MambaOut",
    "MambaOutArch",
    "PlainMamba",
    "PlainMambaArch",
    "ShuffleMamba",
    "ShuffleMambaArch",
    "VMamba",
    "VMambaArch",
    "VSSDArch",
    "Vim",
    "VimArch",
]
