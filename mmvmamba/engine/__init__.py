"""What the MMEngine runner calls."""

from mmvmamba.engine.hooks import PretrainedCheckHook

__all__ = ["PretrainedCheckHook"]
