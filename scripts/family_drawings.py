"""What `scripts/draw_families.py` draws: walks as the package walks them, blocks in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mmvmamba.models.backbones import efficientvmamba, msvmamba
from mmvmamba.models.layers.snake import snake_walks
from mmvmamba.ops import CROSS_SCAN, ScanOrder
from mmvmamba.ops.scan2d.orders import order_to_permutation

SIDE = 4


@dataclasses.dataclass(frozen=True)
class Panel:
    """A map and what happens on it.

    Attributes:
        title: Above it, at most two lines.
        walks: Indices of pixels, row by row, in the order they are visited.
        rows: Of the map.
        columns: Of the map.
        to_all: Whether all pixels give to one state and read from it, without an order.
        shaded: Indices of pixels that are set off.
    """

    title: str
    walks: Sequence[Sequence[int]] = ()
    rows: int = SIDE
    columns: int = SIDE
    to_all: bool = False
    shaded: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Branch:
    """Steps that something is joined with.

    Attributes:
        ways: One chain of steps, or several side by side.
        join: The sign where they meet.
        residual: Whether the input goes around them, too.
    """

    ways: tuple[tuple[str, ...], ...]
    join: str = "+"
    residual: bool = True


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A family.

    Attributes:
        title: Its name.
        panels: Its walks.
        block: Lines of a block: what the line is, and its steps.
    """

    title: str
    panels: tuple[Panel, ...]
    block: tuple[tuple[str, tuple[str | Branch, ...]], ...]


def residual(*steps: str) -> Branch:
    """Return steps whose input is added to their output."""
    return Branch((steps,))


def walk(order: ScanOrder, rows: int = SIDE, columns: int = SIDE) -> list[int]:
    """Return an order of the package on a map."""
    pixels: list[int] = order_to_permutation(order, rows, columns).tolist()
    return pixels


def grid_walk(order: ScanOrder, row: int, column: int) -> list[int]:
    """Return an order over every other row and column of a map, from ``row`` and ``column`` on."""
    pixels = torch.arange(SIDE * SIDE).view(SIDE, SIDE)[row::2, column::2].flatten()
    return [int(pixels[at]) for at in walk(order, SIDE // 2, SIDE // 2)]


_FFN = residual("LayerNorm", "MLP")
_SS2D = ("Linear", "depthwise 3x3", "SiLU", "four scans, summed", "LayerNorm", "Linear")

_BIDIRECTIONAL = (
    "Linear",
    Branch(
        (
            ("causal conv 4", "SiLU", "scan"),
            ("backwards: conv 4", "SiLU", "scan", "forwards again"),
        ),
        residual=False,
    ),
    "x gate / 2",
    "Linear",
)
#: Some permutation of the tokens, which a layer draws anew in every step.
_SHUFFLED: list[int] = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(3)).tolist()

DRAWINGS: dict[str, Drawing] = {
    "vmamba": Drawing(
        "VMamba",
        (
            Panel("rows, there\nand back", [walk(CROSS_SCAN[0]), walk(CROSS_SCAN[2])]),
            Panel("columns, there\nand back", [walk(CROSS_SCAN[1]), walk(CROSS_SCAN[3])]),
        ),
        (("block", (residual("LayerNorm", "SS2D"), _FFN)), ("SS2D", _SS2D)),
    ),
    "msvmamba": Drawing(
        "MSVMamba",
        (
            Panel("the whole map:\none route", [walk(ScanOrder.ROW)]),
            *(
                Panel(f"half the map,\nroute {n}", [walk(ScanOrder[name.upper()])])
                for n, name in enumerate(msvmamba.ARCHS["v1-tiny"].half_routes, 1)
            ),
        ),
        (
            ("block", (residual("LayerNorm", "multi-scale SS2D"), residual("LayerNorm", "ConvFFN"))),
            (
                "multi-scale SS2D",
                (
                    "Linear",
                    Branch(
                        (
                            ("depthwise 3x3", "SiLU", "one scan", "LayerNorm"),
                            ("depthwise 7x7, stride 2", "SiLU", "three scans", "LayerNorm", "resize"),
                        ),
                        residual=False,
                    ),
                    "squeeze-excite",
                    "Linear",
                ),
            ),
        ),
    ),
    "efficientvmamba": Drawing(
        "EfficientVMamba",
        tuple(
            Panel(
                f"grid {k + 1}",
                [grid_walk(order, k % 2, k // 2)],
                shaded=frozenset(grid_walk(ScanOrder.ROW, k % 2, k // 2)),
            )
            for k, order in enumerate(efficientvmamba.GRID_ORDERS)
        ),
        (
            (
                "block of the first two stages",
                (
                    Branch(
                        (("LayerNorm", "atrous SS2D", "x attention"), ("LayerNorm", "conv 3x3", "x attention")),
                    ),
                ),
            ),
            ("block of the others", (residual("1x1", "depthwise 3x3", "squeeze-excite", "1x1"),)),
        ),
    ),
    "vssd": Drawing(
        "VSSD",
        (Panel("one state of all\ntokens, no order", to_all=True),),
        (
            ("block", (residual("depthwise 3x3"), residual("LayerNorm", "NC-SSD"), residual("depthwise 3x3"), _FFN)),
            ("NC-SSD", ("Linear", "depthwise 3x3", "SiLU", "sum over tokens", "read", "LayerNorm", "Linear")),
        ),
    ),
    "mambaout": Drawing(
        "MambaOut",
        (Panel("no scan:\nconvolutions only"),),
        (
            (
                "block",
                (residual("LayerNorm", "Linear", "depthwise 7x7 of a part", "gate", "Linear"),),
            ),
        ),
    ),
    "vim": Drawing(
        "Vim",
        (
            Panel("there: patches\nbefore the class token", [walk(ScanOrder.ROW)[: SIDE * SIDE // 2]]),
            Panel("and those behind it,\nin one sequence", [walk(ScanOrder.ROW)[SIDE * SIDE // 2 :]]),
            Panel("and back", [walk(ScanOrder.ROW_REVERSED)]),
        ),
        (
            ("block (tokens and residual are two streams)", ("add to residual", "RMSNorm", "mixer")),
            ("mixer", _BIDIRECTIONAL),
        ),
    ),
    "shufflemamba": Drawing(
        "ShuffleMamba",
        (
            Panel("there and back", [walk(ScanOrder.ROW), walk(ScanOrder.ROW_REVERSED)]),
            Panel("in training, in some layers:\na random order, undone behind it", [_SHUFFLED, _SHUFFLED[::-1]]),
        ),
        (
            (
                "block (as Vim's; the class token is first, or registers are spread)",
                ("add to residual", "norm", "mixer"),
            ),
            ("mixer", _BIDIRECTIONAL),
        ),
    ),
    "plainmamba": Drawing(
        "PlainMamba",
        tuple(
            Panel(f"walk {n}", [order])
            for n, order in enumerate(snake_walks(SIDE, SIDE, torch.device("cpu")).orders.tolist(), 1)
        ),
        (
            ("block", (residual("LayerNorm", "mixer"),)),
            (
                "mixer",
                (
                    "Linear",
                    Branch(
                        (("depthwise 7x7", "SiLU", "four scans, summed; B knows each step's direction"), ("SiLU",)),
                        join="x",
                        residual=False,
                    ),
                    "Linear",
                ),
            ),
        ),
    ),
    "mobilemamba": Drawing(
        "MobileMamba",
        (Panel("there and back,\na part of the channels", [walk(ScanOrder.ROW), walk(ScanOrder.ROW_REVERSED)]),),
        (
            (
                "block (and its input is added once more)",
                (
                    residual("depthwise 3x3"),
                    residual("FFN"),
                    residual("mixer"),
                    residual("depthwise 3x3"),
                    residual("FFN"),
                ),
            ),
            (
                "mixer: three parts of the channels, side by side",
                (
                    Branch(
                        (("scans + wavelet branch",), ("depthwise 7x7, 5x5 or 3x3",), ("as they are",)),
                        join="|",
                        residual=False,
                    ),
                    "ReLU",
                    "1x1",
                ),
            ),
            (
                "scans + wavelet branch",
                (
                    Branch(
                        (
                            (
                                "1x1",
                                "depthwise 3x3",
                                "SiLU",
                                "two scans, summed",
                                "LayerNorm",
                                "x gate",
                                "1x1",
                                "scale",
                            ),
                            ("Haar wavelets", "depthwise", "scale", "inverse wavelets"),
                        ),
                        residual=False,
                    ),
                ),
            ),
        ),
    ),
    "efficientvim": Drawing(
        "EfficientViM",
        (Panel("a few states of all\ntokens, no order", to_all=True),),
        (
            (
                "block (each + weighs input and step by a learned share of each channel)",
                (
                    residual("depthwise 3x3"),
                    residual("LayerNorm", "HSM-SSD"),
                    residual("depthwise 3x3"),
                    residual("FFN"),
                ),
            ),
            (
                "HSM-SSD",
                ("sum of tokens into states", "Linear, gate, Linear on the states", "read by every token"),
            ),
        ),
    ),
    "hrvmamba": Drawing(
        "HRVMamba",
        (
            Panel("rows, there\nand back", [walk(CROSS_SCAN[0]), walk(CROSS_SCAN[2])]),
            Panel("columns, there\nand back", [walk(CROSS_SCAN[1]), walk(CROSS_SCAN[3])]),
        ),
        (
            (
                "block, in every branch of a high-resolution network",
                (residual("LayerNorm", "depthwise 3x3 to 9x9", "GELU"), residual("LayerNorm", "SS2D"), _FFN),
            ),
            (
                "SS2D",
                ("Linear", "deformable 3x3 (DCNv4)", "SiLU", "four scans, summed", "LayerNorm", "Linear"),
            ),
            (
                "network: branches of strides 4, 8, 16, 32, which exchange maps after every two blocks",
                ("stem", "bottlenecks", "2 branches", "3 branches, 4 times", "4 branches, 2 times", "neck"),
            ),
        ),
    ),
}
