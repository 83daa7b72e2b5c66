"""The backbone families, one file each. ``FAMILIES`` is the list of them: everything else in the house goes by it."""

from mmvmamba.models.backbones.base import BaseBackbone
from mmvmamba.models.backbones.efficientvim import EfficientViM, EfficientViMArch
from mmvmamba.models.backbones.efficientvmamba import EfficientVMamba, EfficientVMambaArch
from mmvmamba.models.backbones.mambaout import MambaOut, MambaOutArch
from mmvmamba.models.backbones.mobilemamba import MobileMamba, MobileMambaArch
from mmvmamba.models.backbones.msvmamba import MSVMamba, MSVMambaArch
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
    "mobilemamba": MobileMamba,
    "efficientvim": EfficientViM,
}

__all__ = [
    "FAMILIES",
    "VSSD",
    "EfficientVMamba",
    "EfficientVMambaArch",
    "EfficientViM",
    "EfficientViMArch",
    "MSVMamba",
    "MSVMambaArch",
    "MambaOut",
    "MambaOutArch",
    "MobileMamba",
    "MobileMambaArch",
    "VMamba",
    "VMambaArch",
    "VSSDArch",
    "Vim",
    "VimArch",
]
