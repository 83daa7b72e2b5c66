"""Scan routes of every family: ``python tools/analysis_tools/scan_routes.py [MODEL ...] [--cells N]``.

On which routes the layers of state spaces walk over their maps, as the operators were called: a strip
(scan_routes.png), an animation (scan_routes.gif) and the steps (scan_routes.json). Without a model the smallest variant
of every family that scans; MambaOut does not.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from mmvmamba.analysis.outputs import output_folder, write_json
from mmvmamba.analysis.route_figures import draw_animation, draw_strip
from mmvmamba.analysis.routes import LayerWalks, walks_at_size
from mmvmamba.apis import run_command
from mmvmamba.apis.networks import load_networks
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.optional import optional_package

CELLS = 8
MOST_ANIMATED = 16  # cells a side: a step of a route is a picture of all networks, and all are held in memory


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names of the model index or config files")
    parser.add_argument("--cells", type=int, default=CELLS, help=f"about so many cells a side ({CELLS})")
    parser.add_argument("--layer", metavar="NAME", help="which layer (default: the first one that scans)")
    parser.add_argument("--no-animation", action="store_true", help="write no GIF")
    parser.add_argument("--out-dir", default="work_dirs/scan_routes", help="(default: work_dirs/scan_routes)")
    return parser.parse_args()


def named_backbones(models: list[str]) -> list[tuple[str, nn.Module]]:
    """Return the backbones to look at, each with a title."""
    if models:
        return [(network.name, network.backbone) for network in load_networks(models, device="cpu")]
    return [(cls.__name__, cls("nano").eval()) for family, cls in FAMILIES.items() if family != "mambaout"]


def main() -> None:
    """Capture and draw."""
    args = parse_args()
    if args.cells > MOST_ANIMATED and not args.no_animation:
        raise ConfigError(
            f"--cells is {args.cells}, expected at most {MOST_ANIMATED} with an animation, which has a picture per "
            "cell. Add --no-animation."
        )
    folder = output_folder(args.out_dir)
    optional_package("PIL", "analysis")
    torch.manual_seed(0)
    networks = track(named_backbones(args.models), "routes", console=Console(stderr=True), transient=True)
    layers = [walks_at_size(title, backbone, args.cells, args.layer) for title, backbone in networks]
    write_json(folder / "scan_routes.json", [as_values(layer) for layer in layers])
    draw_strip(layers, folder / "scan_routes.png")
    written = "scan_routes.png"
    if not args.no_animation:
        draw_animation(layers, folder / "scan_routes.gif")
        written += " and scan_routes.gif"
    width = max(len(layer.title) for layer in layers)
    for layer in layers:
        names = ", ".join(walk.name for walk in layer.walks)
        print(f"{layer.title:<{width}}  {layer.rows:>3} x {layer.columns:<3}  {layer.layer}: {names}")
    print(f"\nsee {written} in {folder}")


def as_values(layer: LayerWalks) -> dict:
    """Return walks as plain values."""
    walks = [dict(name=walk.name, ordered=walk.ordered, start=walk.start, points=walk.points) for walk in layer.walks]
    return dict(title=layer.title, layer=layer.layer, rows=layer.rows, columns=layer.columns, walks=walks)


if __name__ == "__main__":
    run_command(main)
