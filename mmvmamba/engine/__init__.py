"""What the MMEngine runner calls."""

from mmvmamba.engine.hooks import CheckpointCheckHook, PretrainedCheckHook
from mmvmamba.engine.optimizers import Bfloat16OptimWrapper

__all__ = ["Bfloat16OptimWrapper", "CheckpointCheckHook", "PretrainedCheckHook"]
