"""Operations of a forward and of its backward, by `torch.utils.flop_counter` and by part of the model.

Convention, that of PyTorch's counter: an addition or a multiplication counts 1, so a multiply-add of a convolution or a
matrix product 2; norms, activations, sums and products per entry count nothing. Operators of this package count what
`mmvmamba.ops.flops` says; that file also mends PyTorch's count of the backward of grouped convolutions. Published
tables count multiply-adds, see `mmvmamba.analysis.flops`.

The backward is that of the sum of all outputs, to every parameter that wants a gradient; the image wants none. The
model is in evaluation form, and a detector has as many boxes as in `mmvmamba.analysis.flops`, where a training would
sample its own number. Like there, nothing is computed: the tensors have shapes only.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmvmamba.analysis.flops import (
    OUTSIDE,
    PROPOSALS,
    Place,
    copy_without_values,
    model_without_values,
    said_where_values_are_needed,
)
from mmvmamba.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PassCost:
    """Operations of one pass over one image, in PyTorch's convention.

    Attributes:
        flops: All of them.
        by_row: The same by part of the model, the backbone by child as in ``ModelCost.by_row``.
        by_operator: The same by operator.
    """

    flops: int
    by_row: Mapping[str, int]
    by_operator: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class PassesCost:
    """Operations of a forward, and of its backward if that was asked for."""

    forward: PassCost
    backward: PassCost | None


def count_passes(
    cfg: Config, height: int, width: int, *, proposals: int = PROPOSALS, backward: bool = True
) -> PassesCost:
    """Count the passes of one image of ``height`` x ``width`` through the model of a config.

    Args:
        cfg: With ``model`` and ``default_scope``; the weights do not matter and are not read.
        height: Rows.
        width: Columns.
        proposals: How many boxes the second stage of a detector gets.
        backward: Whether to count the backward, too.

    Raises:
        ConfigError: As ``mmvmamba.analysis.flops.count_model``; or if no parameter wants a gradient, with ``backward``.
    """
    model, inputs, unreturned = model_without_values(cfg, height, width, proposals)

    def run() -> list[Any]:
        return [*tree_leaves(model(*inputs, mode="tensor")), *unreturned]

    with said_where_values_are_needed(cfg):
        return _count(model, run, backward)


def count_backbone_passes(model: nn.Module, height: int, width: int, *, backward: bool = True) -> PassesCost:
    """Count the passes of one image of ``height`` x ``width`` through a module that takes nothing else.

    Args:
        model: A backbone of 3 input channels; it is copied, and stays as it is.
        height: Rows.
        width: Columns.
        backward: Whether to count the backward, too.

    Raises:
        ConfigError: If no parameter wants a gradient, with ``backward``.
    """
    copied = copy_without_values(model)
    image = torch.empty(1, 3, height, width, device="meta")
    return _count(copied, lambda: tree_leaves(copied(image)), backward)


def _count(model: nn.Module, run: Callable[[], list[Any]], backward: bool) -> PassesCost:
    # Here, for PyTorch's counter imports Triton.
    from torch.utils.flop_counter import FlopCounterMode

    from mmvmamba.ops.flops import NOT_OURS

    if backward and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "the backward is asked for, but no parameter of the model wants a gradient, expected one that does. Leave "
            "out the backward, or thaw a part of the model (frozen_stages)."
        )
    counter = FlopCounterMode(display=False, custom_mapping=NOT_OURS)
    with torch.set_grad_enabled(backward), counter, _ByRow(model, counter) as rows:
        outputs = [leaf for leaf in run() if isinstance(leaf, Tensor) and leaf.requires_grad]
        forward = rows.take()
        if not backward:
            return PassesCost(forward, None)
        total: Any = sum(output.sum() for output in outputs)
        total.backward()
        return PassesCost(forward, rows.take())


class _ByRow(TorchDispatchMode):
    """Asks PyTorch's counter after each operator what that one has cost, and notes for which row of a table.

    An operator of the backward belongs where that of the forward was recorded whose gradient it computes. The nodes of
    autograd are numbered as they are made; the numbers at which the place changed say where each was made. (PyTorch's
    own attribution by hooks on gradients counts what runs between two of them for both modules.)
    """

    def __init__(self, model: nn.Module, counter: Any) -> None:
        super().__init__()
        self._counter = counter
        self._place = Place(model, self._note)
        self._numbers: list[int] = []
        self._rows: list[str] = []
        self._taken: dict[Any, int] = {}
        self._counts: Counter[str] = Counter()

    def _note(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._rows.append(self._place.row)

    def take(self) -> PassCost:
        """Return what was counted since the last time."""
        now = dict(self._counter.flop_counts["Global"])
        operators = {str(name): count - self._taken.get(name, 0) for name, count in now.items()}
        cost = PassCost(
            sum(operators.values()), dict(self._counts), {name: count for name, count in operators.items() if count}
        )
        self._taken, self._counts = now, Counter()
        return cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it has cost."""
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if cost := self._counter.get_total_flops() - before:
            self._counts[self._row()] += cost
        return out

    def _row(self) -> str:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return self._place.row
        last = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._rows[last] if last >= 0 else OUTSIDE
