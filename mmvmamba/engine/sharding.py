"""What FSDP shards together: one block of a backbone at a time."""

from __future__ import annotations

from torch import nn

from mmvmamba.models.backbones.base import Block
from mmvmamba.registry import FUNCTIONS


@FUNCTIONS.register_module()
def wrap_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:  # noqa: ARG001 (FSDP's signature)
    """Wrap each block of a backbone by itself, and nothing else; the rest of the model is one group.

    For ``auto_wrap_policy="mmvmamba.wrap_blocks"`` of MMEngine's ``MMFullyShardedDataParallel``. A block is used as
    a whole, so that its parameters are gathered once per pass and freed behind it; most parameters of a backbone are
    in its blocks. (Heads of detectors call parts of themselves by name, which a wrapped part may not survive.)

    Args:
        module: What FSDP asks about.
        recurse: Whether it asks if to look inside.
        nonwrapped_numel: Parameters in it that are in no group yet.
    """
    return recurse or isinstance(module, Block)
