"""Hooks, one class per file."""

from mmvmamba.engine.hooks.checkpoint_check_hook import CheckpointCheckHook
from mmvmamba.engine.hooks.checkpoint_hook import CheckpointHook
from mmvmamba.engine.hooks.interrupt_hook import InterruptHook
from mmvmamba.engine.hooks.last_batch_hook import LastBatchHook
from mmvmamba.engine.hooks.non_finite_hook import NonFiniteHook
from mmvmamba.engine.hooks.plain_form_hook import PlainFormHook
from mmvmamba.engine.hooks.prepares_save import PreparesSave
from mmvmamba.engine.hooks.pretrained_check_hook import PretrainedCheckHook
from mmvmamba.engine.hooks.random_state_hook import RandomStateHook

__all__ = [
    "CheckpointCheckHook",
    "CheckpointHook",
    "InterruptHook",
    "LastBatchHook",
    "NonFiniteHook",
    "PlainFormHook",
    "PreparesSave",
    "PretrainedCheckHook",
    "RandomStateHook",
]
