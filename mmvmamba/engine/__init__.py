"""What the MMEngine runner calls."""

from mmvmamba.engine.hooks import (
    CheckpointHook,
    InterruptHook,
    LastBatchHook,
    NonFiniteHook,
    PreparesSave,
    PretrainedCheckHook,
)
from mmvmamba.engine.optimizers import Bfloat16OptimWrapper

__all__ = [
    "Bfloat16OptimWrapper",
    "CheckpointHook",
    "InterruptHook",
    "LastBatchHook",
    "NonFiniteHook",
    "PreparesSave",
    "PretrainedCheckHook",
]
