"""What the MMEngine runner calls."""

from mmvmamba.engine.hooks import (
    CheckpointCheckHook,
    CheckpointHook,
    InterruptHook,
    LastBatchHook,
    NonFiniteHook,
    PreparesSave,
    PretrainedCheckHook,
    RandomStateHook,
)
from mmvmamba.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmvmamba.engine.optimizers import Bfloat16OptimWrapper, SSMOptimWrapperConstructor

__all__ = [
    "Bfloat16OptimWrapper",
    "CheckpointCheckHook",
    "CheckpointHook",
    "EpochBasedTrainLoop",
    "InterruptHook",
    "IterBasedTrainLoop",
    "LastBatchHook",
    "NonFiniteHook",
    "PreparesSave",
    "PretrainedCheckHook",
    "RandomStateHook",
    "SSMOptimWrapperConstructor",
]
