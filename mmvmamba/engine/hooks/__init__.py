"""Hooks, one class per file."""

from mmvmamba.engine.hooks.checkpoint_hook import CheckpointHook
from mmvmamba.engine.hooks.prepares_save import PreparesSave
from mmvmamba.engine.hooks.pretrained_check_hook import PretrainedCheckHook

__all__ = ["CheckpointHook", "PreparesSave", "PretrainedCheckHook"]
