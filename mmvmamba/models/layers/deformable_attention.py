"""Multi-scale deformable attention (https://arxiv.org/abs/2010.04159) between token maps, on mmcv's operator.

Upstream: fundamentalvision/Deformable-DETR, ``MSDeformAttn``. Differences: sizes of maps are numbers, not tensors, so
that nothing is read back from a GPU; mmcv is imported when the attention first runs; the sampling is in float32, or
float64 of a double-precision model, whatever the precision around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers.linear import Linear

#: (rows, columns) of a map.
Grid = tuple[int, int]


class DeformableAttention(nn.Module):
    """Every query looks at a few points around its own place, on one map or several.

    A head samples ``num_points`` points of every level bilinearly (zeros outside) and adds them with softmax weights;
    places and weights are linear in the query. The offsets are in cells of the level and start as a ring around the
    place of the query, one direction per head, the n-th point n cells away; the weights start equal.

    Args:
        channels: Channels of queries, values and output.
        num_heads: Heads; they divide the channels of the values.
        num_levels: Maps that are looked at.
        num_points: Points per head and level.
        value_ratio: Channels of the values as a multiple of ``channels``, rounded down.

    Raises:
        ConfigError: If a size is impossible.
    """

    def __init__(
        self, channels: int, num_heads: int, num_levels: int = 1, num_points: int = 4, value_ratio: float = 1.0
    ) -> None:
        super().__init__()
        inner = int(channels * value_ratio)
        if num_heads < 1 or num_points < 1 or inner < 1 or inner % num_heads:
            raise ConfigError(
                f"DeformableAttention: num_heads is {num_heads} and num_points {num_points} with {inner} channels of "
                f"values (value_ratio {value_ratio} of {channels}), expected at least one of each and heads that "
                "divide the channels. Correct them."
            )
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = Linear(channels, samples * 2)
        self.attention_weights = Linear(channels, samples)
        self.value_proj = Linear(channels, inner)
        self.output_proj = Linear(inner, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        ring = torch.stack([angles.cos(), angles.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)  # on the edge of a square, so that whole cells are met
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = ring[:, None, None] * distances[:, None]  # (k, 1, p, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for layer in (self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(layer)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, places: Tensor, value: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return (b, q, c) for queries (b, q, c).

        Args:
            query: (b, q, c).
            places: Where each query is (q, 2), as fractions of width and height, see ``cell_centres``.
            value: The levels one after another, each row by row (b, l, c).
            grids: Rows and columns of every level.
        """
        b, q, _ = query.shape
        k, levels, points = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(value)
        accumulate = torch.float64 if value.dtype == torch.float64 else torch.float32
        offsets = self.sampling_offsets(query).to(accumulate).view(b, q, k, levels, points, 2)
        weights = self.attention_weights(query).to(accumulate).view(b, q, k, levels * points).softmax(-1)
        sizes = torch.tensor([(columns, rows) for rows, columns in grids], dtype=accumulate, device=query.device)
        locations = places.to(accumulate)[:, None, None, None] + offsets / sizes[:, None]
        heads = value.to(accumulate).unflatten(-1, (k, value.shape[-1] // k))
        sampled = sample_points(heads, grids, locations, weights.view(b, q, k, levels, points))
        return self.output_proj(sampled.to(value.dtype))


def sample_points(value: Tensor, grids: Sequence[Grid], locations: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of bilinear samples (b, q, k * p) by mmcv's operator.

    Args:
        value: The levels one after another (b, l, k, p), k heads of p channels.
        grids: Rows and columns of every level.
        locations: (b, q, k, levels, points, 2), as fractions of width and height.
        weights: (b, q, k, levels, points).

    Raises:
        ImportError: If mmcv is not installed.
    """
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    if value.device.type != "cuda" or value.shape[0] == 0 or locations.shape[1] == 0:
        sampled: Tensor = multi_scale_deformable_attn_pytorch(value, list(grids), locations, weights)
        return sampled
    shapes = torch.tensor(list(grids), dtype=torch.int64, device=value.device)
    areas = [rows * columns for rows, columns in grids]
    starts = torch.tensor([sum(areas[:i]) for i in range(len(areas))], dtype=torch.int64, device=value.device)
    # Its kernel takes the images in steps that must divide the batch: all at once always do.
    with torch.autocast("cuda", enabled=False):
        sampled = MultiScaleDeformableAttnFunction.apply(
            value.contiguous(), shapes, starts, locations.contiguous(), weights.contiguous(), value.shape[0]
        )
    return sampled


def cell_centres(grids: Sequence[Grid], device: torch.device | None = None) -> Tensor:
    """Return where the cells of some maps are (l, 2), row by row, as fractions (x, y) of width and height."""
    maps = []
    for rows, columns in grids:
        y = (torch.arange(rows, dtype=torch.float32, device=device) + 0.5) / rows
        x = (torch.arange(columns, dtype=torch.float32, device=device) + 0.5) / columns
        maps.append(torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], -1).flatten(0, 1))
    return torch.cat(maps)
