"""The scans that a network runs, seen from outside: operators, their arguments, and where on the map they are.

No model is changed. A dispatch mode of PyTorch sees every ``mmvmamba::`` operator of this thread, and hooks on all
modules say which layer called it and on which map that layer works.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmvmamba.ops  # noqa: F401  (registers the operators)
from mmvmamba.models.layers.tokens import TokenLayout
from mmvmamba.ops.backends import only_operators
from mmvmamba.ops.library import TWINS, twin

SCANS = ("scan2d", "selective_scan", "ssd", "ssd_non_causal", "ssd_state", "ssd_read")
_NAMES = {getattr(torch.ops.mmvmamba, twin(name, suffix)): name for name in SCANS for suffix in TWINS}


class MapLayout(NamedTuple):
    """The map that a layer works on.

    Attributes:
        rows: Its rows.
        columns: Its columns.
        extra: Rising positions, in the sequence of its tokens, of those that are no cells of the map.
    """

    rows: int
    columns: int
    extra: tuple[int, ...] = ()


@dataclass(frozen=True)
class ScanCall:
    """One call of an operator.

    Attributes:
        layer: Name of the innermost module that was running, such as ``"layers.0.blocks.1.op"``.
        module: That module.
        number: How many calls that layer had made before in this run.
        operator: One of ``SCANS``.
        arguments: As the schema of the operator has them. They may be overwritten after the call.
        layout: The layer's map; None if no module around the call was given a map (b, h, w, c) or a token layout.
    """

    layer: str
    module: nn.Module
    number: int
    operator: str
    arguments: tuple[Any, ...]
    layout: MapLayout | None


class _Running(NamedTuple):
    name: str
    module: nn.Module
    layout: MapLayout | None


@contextlib.contextmanager
def watch_scans(model: nn.Module, seen: Callable[[ScanCall], None]) -> Iterator[None]:
    """Call ``seen`` for every scan operator that ``model`` runs in this thread inside the ``with``.

    Args:
        model: Any network; how it names its modules is how layers are called.
        seen: Called after the operator, under ``no_grad`` and outside the watch.
    """
    running: list[_Running] = []
    thread = threading.get_ident()
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            if threading.get_ident() != thread:
                return  # somebody else's run of the same network
            running.append(_Running(name, module, _layout_of((*args, *kwargs.values()))))

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            if threading.get_ident() == thread:
                running.pop()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with only_operators(), _Watch(running, seen):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _layout_of(inputs: tuple[Any, ...]) -> MapLayout | None:
    """Return the map that the inputs of a module speak of: a token layout, else a tensor (b, h, w, c)."""
    for value in inputs:
        if isinstance(value, TokenLayout):
            return MapLayout(value.rows, value.columns, value.extra)
    for value in inputs:
        if isinstance(value, Tensor) and value.dim() == 4:
            return MapLayout(value.shape[1], value.shape[2])
    return None


class _Watch(TorchDispatchMode):
    def __init__(self, running: list[_Running], seen: Callable[[ScanCall], None]) -> None:
        super().__init__()
        self.running, self.seen = running, seen
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and report it if it is a scan."""
        out = func(*args, **(kwargs or {}))
        operator = _NAMES.get(func.overloadpacket)
        if operator is not None:
            layer, module = "", None
            if self.running:
                layer, module, _ = self.running[-1]
            number = self.calls.get(layer, 0)
            self.calls[layer] = number + 1
            with torch.no_grad():
                self.seen(ScanCall(layer, module or nn.Identity(), number, operator, tuple(args), self._layout()))
        return out

    def _layout(self) -> MapLayout | None:
        """Return the map of the innermost module that was given one."""
        return next((entry.layout for entry in reversed(self.running) if entry.layout is not None), None)
