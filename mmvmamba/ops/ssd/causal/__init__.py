"""The causal form: the scan of Mamba-2."""

from mmvmamba.ops.ssd.causal.interface import ssd

__all__ = ["ssd"]
