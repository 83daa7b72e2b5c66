"""The backbone families, one file each."""

from mmvmamba.models.backbones.vmamba import VMamba, VMambaArch

__all__ = ["VMamba", "VMambaArch"]
