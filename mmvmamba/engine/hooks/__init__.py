"""Hooks, one class per file."""

from mmvmamba.engine.hooks.pretrained_check_hook import PretrainedCheckHook

__all__ = ["PretrainedCheckHook"]
