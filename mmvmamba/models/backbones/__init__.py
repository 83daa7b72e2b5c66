"""The backbone families, one file each. ``FAMILIES`` is the list of them: everything else in the house goes by it."""

from mmvmamba.models.backbones.base import BaseBackbone
from mmvmamba.models.backbones.mambaout import MambaOut, MambaOutArch
from mmvmamba.models.backbones.vmamba import VMamba, VMambaArch

#: Name of a family, which is that of its modules here and in ``mmvmamba.converters``, and its class.
FAMILIES: dict[str, type[BaseBackbone]] = {
    "mambaout": MambaOut,
    "vmamba": VMamba,
}

__all__ = ["FAMILIES", "MambaOut", "MambaOutArch", "VMamba", "VMambaArch"]
