"""What the MMEngine runner calls."""

from mmvmamba.engine.hooks import CheckpointHook, PretrainedCheckHook, RandomStateHook
from mmvmamba.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmvmamba.engine.optimizers import Bfloat16OptimWrapper

__all__ = [
    "Bfloat16OptimWrapper",
    "CheckpointHook",
    "EpochBasedTrainLoop",
    "IterBasedTrainLoop",
    "PretrainedCheckHook",
    "RandomStateHook",
]
