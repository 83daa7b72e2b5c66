"""Deformable aggregation: every pixel adds up what it finds at nine places that it chooses itself.

Paper: DCNv4 (https://arxiv.org/abs/2401.06197). This is its operator without the two linear maps around it, as
HRVMamba uses it. Upstream: OpenGVLab/DCNv4, a CUDA operator that takes (n, l, c) and cannot run elsewhere.

The same sum is a modulated deformable convolution whose weights are all one. On a GPU it is torchvision's
``deform_conv2d``. On a CPU that one spends its time in scalar code (64x64x64 map, one thread: 46 ms), so there the
36 corners of a pixel's places are a bag of PyTorch's ``embedding_bag``, which adds weighted rows of a table in vector
code: the map is the table, its rows are the channels of one group of one pixel.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from mmvmamba.errors import BackendError, ConfigError
from mmvmamba.models.layers.conv import ChannelsLastConv2d
from mmvmamba.models.layers.depthwise import convolve_depthwise
from mmvmamba.models.layers.linear import Linear
from mmvmamba.models.layers.onednn import is_traced

#: Side of the square of places that the offsets start from, and their number.
KERNEL, POINTS = 3, 9
#: Numbers that every group of a pixel has: an offset in x and in y per point, then a weight per point.
PER_GROUP = 3 * POINTS
#: Channels of a group are a multiple of this in upstream's kernel, and the projection's width one of the other.
_CHANNELS_OF_A_GROUP, _ALIGNMENT = 16, 8
# Zeros around the map on every side: what is further out is moved to where all four corners of a place are zero.
_BORDER = 2
_LAST_INT32 = 2**31 - 1


class DeformableAggregation(nn.Module):
    """Deformable aggregation with places and weights that are linear maps of the pixel.

    Args:
        channels: Channels d of input and output.
        groups: Groups of channels, each with nine places of its own.
        depthwise: Whether a depthwise 3x3 convolution comes before the linear map.

    Raises:
        ConfigError: If the channels of a group are no multiple of 16, which upstream's kernel asks for.
    """

    def __init__(self, channels: int, groups: int, depthwise: bool = False) -> None:
        super().__init__()
        if groups < 1 or channels % groups or channels // groups % _CHANNELS_OF_A_GROUP:
            raise ConfigError(
                f"DeformableAggregation: {channels} channels in {groups} groups, expected groups of a multiple of "
                f"{_CHANNELS_OF_A_GROUP} channels each, as the original operator has them. Choose a width of 8 or a "
                "multiple of 16 (with the released ratio of 2 and one group for every 16)."
            )
        self.groups = groups
        self.offset_mask_dw = (
            ChannelsLastConv2d(channels, channels, 3, padding=1, groups=channels) if depthwise else None
        )
        self.offset_mask = Linear(channels, math.ceil(PER_GROUP * groups / _ALIGNMENT) * _ALIGNMENT)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, d) to (b, h, w, d)."""
        seen = x if self.offset_mask_dw is None else convolve_depthwise(self.offset_mask_dw, x)
        return deformable_aggregation(x, self.offset_mask(seen), self.groups)


def deformable_aggregation(x: Tensor, offset_mask: Tensor, groups: int) -> Tensor:
    """Return the sum over nine points p of ``mask_p * x[place_p]`` for every pixel and group of channels.

    Point p = 3 i + j is i columns and j rows behind the top left neighbour, column by column, plus its offset.
    A place between pixels is interpolated bilinearly; corners outside the map are 0. It is computed in float32
    (float64 for a float64 map) whatever the input is.

    Args:
        x: Map (b, h, w, d).
        offset_mask: (b, h, w, 27 g or more): for every group nine pairs of offsets (x, y), then nine masks. What is
            behind them is not looked at.
        groups: Groups g of d / g channels each.

    Returns:
        (b, h, w, d) in the dtype of ``x``.

    Raises:
        BackendError: If the map is on a GPU and torchvision is not installed.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    device = x.device.type
    # Meta tensors have no autocast. To ask PyTorch which devices have one would break a graph of torch.compile.
    with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        narrow = offset_mask[..., : PER_GROUP * groups].to(dtype)
        if device == "cuda":
            y = aggregate_by_convolution(x.to(dtype), narrow, groups)
        elif torch.is_grad_enabled() and device != "meta" and _is_plain():  # its gradient sorts rows by their values
            y = _Aggregate.apply(x.to(dtype), narrow, groups)
        else:
            y = aggregate_by_bags(x.to(dtype), narrow, groups)
    return y.to(x.dtype)


def aggregate_by_convolution(x: Tensor, offset_mask: Tensor, groups: int) -> Tensor:
    """Return `deformable_aggregation` by torchvision's operator, for ``offset_mask`` (b, h, w, 27 g) in x's dtype.

    Weights that are a unit matrix for every group give what ones for every channel give, in as many matrix products
    as there are groups instead of as there are channels.
    """
    try:
        from torchvision.ops import deform_conv2d  # type: ignore[import-untyped]  # torchvision has no types
    except ImportError as error:
        raise BackendError(
            "deformable aggregation on a GPU is torchvision's deform_conv2d, and torchvision cannot be imported: "
            f"{error}. Install the torchvision release of your PyTorch."
        ) from error
    b, h, w, d = x.shape
    width = d // groups
    numbers = offset_mask.reshape(b, h, w, groups, PER_GROUP)
    # (x, y) of column-wise points become (y, x) of row-wise ones.
    pairs = numbers[..., : 2 * POINTS].reshape(b, h, w, groups, KERNEL, KERNEL, 2).flip(-1)
    offsets = pairs.permute(0, 3, 5, 4, 6, 1, 2).reshape(b, 2 * POINTS * groups, h, w)
    masks = numbers[..., 2 * POINTS :].reshape(b, h, w, groups, KERNEL, KERNEL)
    masks = masks.permute(0, 3, 5, 4, 1, 2).reshape(b, POINTS * groups, h, w)
    unit = torch.eye(width, dtype=x.dtype, device=x.device).view(1, width, width, 1, 1)
    weight = unit.expand(groups, width, width, KERNEL, KERNEL).reshape(d, width, KERNEL, KERNEL)
    y: Tensor = deform_conv2d(x.permute(0, 3, 1, 2).contiguous(), offsets, weight, padding=KERNEL // 2, mask=masks)
    return y.permute(0, 2, 3, 1)


def aggregate_by_bags(x: Tensor, offset_mask: Tensor, groups: int) -> Tensor:
    """Return `deformable_aggregation` by PyTorch's operators, for ``offset_mask`` (b, h, w, 27 g) in x's dtype."""
    fractions, rows = _places(offset_mask, x.shape, groups)
    table = _table(x, groups)
    y = F.embedding_bag(rows, table, mode="sum", per_sample_weights=_corner_weights(*fractions))
    return y.view(x.shape)


def _is_plain() -> bool:
    """Return whether an autograd function without rules for transforms and forward mode may record what is done."""
    return not is_traced() and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def _table(x: Tensor, groups: int) -> Tensor:
    """Return the rows (m, d / g) of the zero-padded map ``x`` (b, h, w, d)."""
    return F.pad(x, (0, 0, _BORDER, _BORDER, _BORDER, _BORDER)).reshape(-1, x.shape[3] // groups)


def _places(offset_mask: Tensor, size: torch.Size, groups: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return where the nine places of every pixel and group lie.

    A place outside of the map and its border is moved to where all its corners are zero, so that every row exists.

    Args:
        offset_mask: (b, h, w, 27 g).
        size: That of the map (b, h, w, d).
        groups: Groups g.

    Returns:
        How far the places are from their upper left corners in x and in y and their masks, all (b h w g, 9), and the
        rows of `_table` that the corners are (b h w g, 36).
    """
    b, h, w, _ = size
    device, dtype = offset_mask.device, offset_mask.dtype
    points = torch.arange(POINTS, device=device)
    columns = torch.arange(w, device=device).view(w, 1, 1) + (points // KERNEL - KERNEL // 2)
    lines = torch.arange(h, device=device).view(h, 1, 1, 1) + (points % KERNEL - KERNEL // 2)
    numbers = offset_mask.reshape(b, h, w, groups, PER_GROUP)
    x = (numbers[..., 0 : 2 * POINTS : 2] + columns.to(dtype)).clamp(-_BORDER, w)
    y = (numbers[..., 1 : 2 * POINTS : 2] + lines.to(dtype)).clamp(-_BORDER, h)
    # A NaN has some row, too: the fraction hands it on.
    left, top = (places.detach().floor().nan_to_num(-_BORDER) for places in (x, y))
    wide, high = w + 2 * _BORDER, h + 2 * _BORDER
    # The index of a row fits 32 bits for every map but the largest; a trace must not look.
    integer = torch.int64 if is_traced() or b * wide * high * groups > _LAST_INT32 else torch.int32
    images = torch.arange(b, device=device, dtype=integer).view(b, 1, 1, 1, 1) * (high * wide)
    first = (images + _BORDER * (wide + 1)) * groups + torch.arange(groups, device=device, dtype=integer).view(-1, 1)
    corner = (top.to(integer) * wide + left.to(integer)) * groups + first
    rows = torch.stack((corner, corner + groups, corner + wide * groups, corner + (wide + 1) * groups), dim=-2)
    fractions = (
        (x - left).view(-1, POINTS),
        (y - top).view(-1, POINTS),
        numbers[..., 2 * POINTS :].reshape(-1, POINTS),
    )
    return fractions, rows.view(-1, 4 * POINTS)


def _corner_weights(fx: Tensor, fy: Tensor, mask: Tensor) -> Tensor:
    """Return the weights (m, 36) of the corners of places from what `_places` returns, in the order of its rows."""
    below = fy * mask
    above = mask - below
    right_above, right_below = above * fx, below * fx
    return torch.stack((above - right_above, right_above, below - right_below, right_below), dim=1).flatten(1)


class _Aggregate(torch.autograd.Function):
    """`aggregate_by_bags`, with gradients by bags, too; twice differentiable.

    Kept are the two arguments; all else is computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset_mask: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, offset_mask)
        ctx.groups = groups
        return aggregate_by_bags(x, offset_mask, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, offset_mask = ctx.saved_tensors
        of_x, of_offsets = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return *_plain_gradients(grad, x, offset_mask, ctx.groups, (of_x, of_offsets)), None
        fractions, rows = _places(offset_mask, x.shape, ctx.groups)
        grads_of_groups = grad.contiguous().view(-1, x.shape[3] // ctx.groups)
        grad_x = grad_offsets = None
        if of_x:
            grad_x = _map_gradient(grads_of_groups, rows, _corner_weights(*fractions), x.shape, ctx.groups)
        if of_offsets:
            of_weights = _weight_gradient(grads_of_groups, _table(x, ctx.groups), rows)
            grad_offsets = _offset_gradient(of_weights, *fractions).view(offset_mask.shape)
        return grad_x, grad_offsets, None


def _map_gradient(grad: Tensor, rows: Tensor, weights: Tensor, size: torch.Size, groups: int) -> Tensor:
    """Return the gradient (b, h, w, d) of the map: for every row the bag of results that it went into.

    Args:
        grad: That of the result (m, d / g).
        rows: The rows that every result has (m, 36).
        weights: With which weight (m, 36).
        size: That of the map.
        groups: Groups g.
    """
    b, h, w, d = size
    wide, high = w + 2 * _BORDER, h + 2 * _BORDER
    count = b * high * wide * groups
    order = rows.flatten().sort(stable=True)[1]
    sizes = torch.bincount(rows.flatten(), minlength=count)
    starts = sizes.cumsum(0) - sizes
    bags = torch.div(order, 4 * POINTS, rounding_mode="floor")
    table = F.embedding_bag(bags, grad, starts, mode="sum", per_sample_weights=weights.flatten()[order])
    inner = table.view(b, high, wide, d)[:, _BORDER : _BORDER + h, _BORDER : _BORDER + w]
    return inner.contiguous()


def _weight_gradient(grad: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Return the products (m, 36) of every result's gradient ``grad`` (m, c) with the rows that it has."""
    bags = torch.arange(len(rows), dtype=rows.dtype, device=rows.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad,
        table,
        rows.flatten(),
        bags * (4 * POINTS),
        bags.repeat_interleave(4 * POINTS),
        0,  # the sum
    ).view_as(rows)


def _offset_gradient(of_weights: Tensor, fx: Tensor, fy: Tensor, mask: Tensor) -> Tensor:
    """Return the gradient of offsets and masks (m, 27) from that of the corners' weights (m, 36) and `_places`.

    A place that was moved has none: all its corners are zero.
    """
    left_above, right_above, left_below, right_below = of_weights.view(-1, 4, POINTS).unbind(1)
    above, below = right_above - left_above, right_below - left_below
    # What the interpolation along x gives in the upper and in the lower line.
    upper, lower = left_above + fx * above, left_below + fx * below
    of_x = mask * (above + fy * (below - above))
    of_y = mask * (lower - upper)
    of_mask = upper + fy * (lower - upper)
    return torch.cat((torch.stack((of_x, of_y), dim=-1).flatten(1), of_mask), dim=1)


def _plain_gradients(
    grad: Tensor, x: Tensor, offset_mask: Tensor, groups: int, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The same two gradients by operators that can be differentiated again."""
    fractions, rows = _places(offset_mask, x.shape, groups)
    picked = _table(x, groups)[rows.long()]
    y = (picked * _corner_weights(*fractions).unsqueeze(2)).sum(1).view(x.shape)
    wanted = [t for t, is_needed in zip((x, offset_mask), needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return next(found) if needed[0] else None, next(found) if needed[1] else None
