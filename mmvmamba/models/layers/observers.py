"""Whether anybody watches a module, which a fused computation would pass by."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_unobserved(*modules: nn.Module) -> bool:
    """Return whether calling the ``modules`` runs their class's ``forward`` and no hook of any kind.

    A computation that takes the parameters of several modules at once, without calling them, would leave out their
    hooks (feature recorders, quantisation, pruning), or a ``forward`` put on the instance, without a word.
    """
    return not torch_module._has_any_global_hook() and not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        for m in modules
    )
