"""What the MMEngine runner calls."""

from mmvmamba.engine.hooks import PretrainedCheckHook, RandomStateHook
from mmvmamba.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmvmamba.engine.optimizers import Bfloat16OptimWrapper

__all__ = [
    "Bfloat16OptimWrapper",
    "EpochBasedTrainLoop",
    "IterBasedTrainLoop",
    "PretrainedCheckHook",
    "RandomStateHook",
]
