"""State space duality: one decay per head, so that the scan is made of matrix products; causal and not."""

from mmvmamba.ops.ssd.causal import ssd
from mmvmamba.ops.ssd.heads import HeadGroups
from mmvmamba.ops.ssd.non_causal import ssd_non_causal, ssd_read, ssd_state

__all__ = ["HeadGroups", "ssd", "ssd_non_causal", "ssd_read", "ssd_state"]
