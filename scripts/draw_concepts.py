"""Draw the figures of docs/concepts.md from the operator itself: ``python scripts/draw_concepts.py``.

What a pixel reads is not drawn by hand: it is the gradient of its output with respect to every input pixel, which for
one channel with fixed step sizes is the weight that the scan gives it.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout, whether or not one is installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from mmvmamba.ops import CROSS_SCAN, ScanOrder, scan2d  # noqa: E402

FIGURES = ROOT / "docs" / "images" / "concepts"
SIDE, QUERY = 14, (5, 8)
TITLES = {
    ScanOrder.ROW: "row by row",
    ScanOrder.COLUMN: "column by column",
    ScanOrder.ROW_REVERSED: "row by row, backwards",
    ScanOrder.COLUMN_REVERSED: "column by column, backwards",
}


def weights(order: ScanOrder | tuple[ScanOrder, ...], step: float, side: int = SIDE) -> Tensor:
    """Return what the query pixel reads of every pixel (h, w), with one state, A = -1, B = C = 1 and this step size."""
    orders = order if isinstance(order, tuple) else (order,)
    k = len(orders)
    x = torch.ones(1, side, side, 1, dtype=torch.float64, requires_grad=True)
    projections = torch.tensor([step, 1.0, 1.0], dtype=torch.float64).expand(1, side, side, k, 3)
    out = scan2d(
        x,
        projections,
        torch.ones(k, 1, 1, dtype=torch.float64),
        None,
        -torch.ones(k, 1, 1, dtype=torch.float64),
        orders=orders,
        delta_softplus=False,
    )
    (found,) = torch.autograd.grad(out[0, QUERY[0], QUERY[1], 0], x)
    return found[0, ..., 0]


def draw_reading(target: Path, step: float = 0.2) -> None:
    """Draw the four directions and their sum."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    panels = [(TITLES[order], weights(order, step)) for order in CROSS_SCAN]
    panels.append(("sum of the four", weights(CROSS_SCAN, step)))
    top = float(panels[-1][1].max())
    figure, axes = plt.subplots(1, 5, figsize=(13, 3.3), layout="constrained")
    for axis, (title, values) in zip(axes, panels, strict=True):
        # A power law, or all but the neighbours on the route would be black.
        image = axis.imshow(values, cmap="magma", norm=mpl.colors.PowerNorm(0.4, vmin=0.0, vmax=top))
        axis.plot(QUERY[1], QUERY[0], "o", mfc="none", mec="cyan", ms=9, mew=1.8)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01, ticks=[0.0, 0.01, 0.05, 0.2, 0.5, top])
    bar.set_label("weight in the circled pixel's output")
    bar.ax.set_yticklabels(["0", "0.01", "0.05", "0.2", "0.5", f"{top:.2f}"])
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_steps(target: Path) -> None:
    """Draw how far a scan remembers at several step sizes."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    figure, axis = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for step in (0.02, 0.1, 0.5, 2.0):
        route = weights(ScanOrder.ROW, step).flatten()
        end = QUERY[0] * SIDE + QUERY[1]
        back = range(61)
        axis.plot(back, [float(route[end - i]) for i in back], label=f"step size {step:g}")
    axis.set_yscale("log")
    axis.set_ylim(1e-4, 3)
    axis.set_xlabel("positions back along the route")
    axis.set_ylabel("weight in the output")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draw both."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, draw in (("reading.png", draw_reading), ("steps.png", draw_steps)):
        draw(FIGURES / name)
        print(f"wrote {(FIGURES / name).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
