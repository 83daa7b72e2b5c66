"""What the MMEngine runner calls."""

from mmvmamba.engine.hooks import CheckpointCheckHook, CheckpointHook, PreparesSave, PretrainedCheckHook
from mmvmamba.engine.optimizers import Bfloat16OptimWrapper

__all__ = ["Bfloat16OptimWrapper", "CheckpointCheckHook", "CheckpointHook", "PreparesSave", "PretrainedCheckHook"]
