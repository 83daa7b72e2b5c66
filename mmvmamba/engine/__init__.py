"""What the MMEngine runner calls."""

from mmvmamba.engine.hooks import (
    CheckpointCheckHook,
    CheckpointHook,
    InterruptHook,
    LastBatchHook,
    NonFiniteHook,
    PlainFormHook,
    PreparesSave,
    PretrainedCheckHook,
    RandomStateHook,
)
from mmvmamba.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmvmamba.engine.optimizers import Bfloat16OptimWrapper, SSMOptimWrapperConstructor
from mmvmamba.engine.sharding import wrap_blocks

__all__ = [
    "Bfloat16OptimWrapper",
    "CheckpointCheckHook",
    "CheckpointHook",
    "EpochBasedTrainLoop",
    "InterruptHook",
    "IterBasedTrainLoop",
    "LastBatchHook",
    "NonFiniteHook",
    "PlainFormHook",
    "PreparesSave",
    "PretrainedCheckHook",
    "RandomStateHook",
    "SSMOptimWrapperConstructor",
    "wrap_blocks",
]
