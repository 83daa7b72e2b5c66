"""Hooks, one class per file."""

from mmvmamba.engine.hooks.checkpoint_check_hook import CheckpointCheckHook
from mmvmamba.engine.hooks.checkpoint_hook import CheckpointHook
from mmvmamba.engine.hooks.prepares_save import PreparesSave
from mmvmamba.engine.hooks.pretrained_check_hook import PretrainedCheckHook

__all__ = ["CheckpointCheckHook", "CheckpointHook", "PreparesSave", "PretrainedCheckHook"]
