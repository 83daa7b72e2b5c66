"""Continuous ("snake") walks over a map: every step goes to a neighbour.

Paper: PlainMamba (https://arxiv.org/abs/2403.17695). Upstream: ChenhongyiYang/PlainMamba, plain_mamba_layer.py.
Difference: computed for the grid at hand by tensor operations, once per image batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmvmamba.ops.scan2d.orders import remember_range

#: What a step into a token may be: there is none into the first, the others go to a neighbour.
STEPS = ("start", "right", "left", "up", "down")
_START, _RIGHT, _LEFT, _UP, _DOWN = range(len(STEPS))
#: Row by row and back, column by column and back.
NUM_WALKS = 4


class SnakeWalks(NamedTuple):
    """The four walks over a grid of l tokens.

    Attributes:
        orders: Token of every step (4, l), int64, which is ``row * columns + column``.
        times: Step of every token, token by token for all four walks (l * 4,), int64.
        steps: Direction of the step into every token, an index of ``STEPS``, in the same order (l * 4,), int64.
    """

    orders: Tensor
    times: Tensor
    steps: Tensor


def snake_walks(rows: int, columns: int, device: torch.device) -> SnakeWalks:
    """Return the four walks over a grid: from the first row down, back, from the first column to the right, back."""
    tokens = torch.arange(rows * columns, device=device)
    by_row, row_steps = _walk(tokens.view(rows, columns), _RIGHT, _LEFT, _DOWN)
    by_column, column_steps = _walk(tokens.view(rows, columns).t(), _DOWN, _UP, _RIGHT)
    orders = torch.stack([by_row, by_row.flip(0), by_column, by_column.flip(0)])
    steps = torch.stack([row_steps, _backwards(row_steps), column_steps, _backwards(column_steps)])
    times = torch.empty_like(orders).scatter_(1, orders, tokens.expand(NUM_WALKS, -1))
    return SnakeWalks(
        remember_range(orders, 0, max(rows * columns - 1, 0)),
        times.t().reshape(-1),
        steps.gather(1, times).t().reshape(-1),
    )


def _walk(tokens: Tensor, there: int, back: int, onwards: int) -> tuple[Tensor, Tensor]:
    """Return the tokens (l,) of a walk over lines (lines, length), every other one backwards, and the steps (l,)."""
    odd = (torch.arange(tokens.shape[0], device=tokens.device) % 2 == 1)[:, None]
    steps = torch.where(odd, back, there).expand(tokens.shape).clone()
    steps[:, :1] = onwards
    steps[:1, :1] = _START
    return torch.where(odd, tokens.flip(1), tokens).flatten(), steps.flatten()


def _backwards(steps: Tensor) -> Tensor:
    """Return the steps (l,) of the same walk from its end: the opposite of those that are undone."""
    opposite = torch.tensor([_START, _LEFT, _RIGHT, _DOWN, _UP], device=steps.device)
    return torch.cat([steps[:1], opposite[steps[1:].flip(0)]])
