"""Hooks, one class per file."""

from mmvmamba.engine.hooks.pretrained_check_hook import PretrainedCheckHook
from mmvmamba.engine.hooks.random_state_hook import RandomStateHook

__all__ = ["PretrainedCheckHook", "RandomStateHook"]
