"""The fused 2D scan operator and its routes."""

from mmvmamba.ops.scan2d.interface import scan2d
from mmvmamba.ops.scan2d.orders import (
    BIDIRECTIONAL_SCAN,
    CROSS_SCAN,
    UNIDIRECTIONAL_SCAN,
    ScanOrder,
    order_to_permutation,
)

__all__ = [
    "BIDIRECTIONAL_SCAN",
    "CROSS_SCAN",
    "UNIDIRECTIONAL_SCAN",
    "ScanOrder",
    "order_to_permutation",
    "scan2d",
]
