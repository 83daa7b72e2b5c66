"""Hooks, one class per file."""

from mmvmamba.engine.hooks.checkpoint_hook import CheckpointHook
from mmvmamba.engine.hooks.prepares_save import PreparesSave
from mmvmamba.engine.hooks.pretrained_check_hook import PretrainedCheckHook
from mmvmamba.engine.hooks.random_state_hook import RandomStateHook

__all__ = ["CheckpointHook", "PreparesSave", "PretrainedCheckHook", "RandomStateHook"]
