"""Operators: pure functions on tensors, each with several backends that give the same numbers.

Needs PyTorch alone. `available_backends` reports what can run here and why the rest cannot.
"""

from mmvmamba.ops.backends import BackendStatus, available_backends, use_backend
from mmvmamba.ops.causal_conv import causal_conv1d
from mmvmamba.ops.depthwise_conv import depthwise_conv2d
from mmvmamba.ops.scan2d import (
    BIDIRECTIONAL_SCAN,
    CROSS_SCAN,
    UNIDIRECTIONAL_SCAN,
    ScanOrder,
    order_to_permutation,
    scan2d,
)
from mmvmamba.ops.selective_scan import selective_scan
from mmvmamba.ops.ssd import HeadGroups, ssd, ssd_non_causal, ssd_read, ssd_state

__all__ = [
    "BIDIRECTIONAL_SCAN",
    "CROSS_SCAN",
    "UNIDIRECTIONAL_SCAN",
    "BackendStatus",
    "HeadGroups",
    "ScanOrder",
    "available_backends",
    "causal_conv1d",
    "depthwise_conv2d",
    "order_to_permutation",
    "scan2d",
    "selective_scan",
    "ssd",
    "ssd_non_causal",
    "ssd_read",
    "ssd_state",
    "use_backend",
]
