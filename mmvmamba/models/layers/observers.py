"""Whether anybody watches a module, which a fused computation would pass by."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_unobserved(*modules: nn.Module) -> bool:
    """Return whether no hook of any kind would run when the ``modules`` are called.

    A computation that takes the parameters of several modules at once, without calling them, would leave out their
    hooks (feature recorders, quantisation, pruning) without a word; it may run only if there are none.
    """
    return not torch_module._has_any_global_hook() and not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )
