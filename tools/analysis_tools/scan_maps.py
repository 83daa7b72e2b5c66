"""Scan maps: ``python tools/analysis_tools/scan_maps.py MODEL [--weights FILE] [--pixel ROW COLUMN] [--layer NAME]``.

From which cells of its map a layer of state spaces takes what it writes to one pixel, for each direction and summed,
over the image: QK^T, (Q * w)(K / w)^T and the full weights; mmvmamba/analysis/scan_maps.py says what they are. Writes
scan_maps.png, scan_maps.json and scan_maps.npz, which has every map.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from mmvmamba.analysis.images import read_images
from mmvmamba.analysis.outputs import output_folder, write_json
from mmvmamba.analysis.scan_figures import draw_scan_maps
from mmvmamba.analysis.scan_maps import ScanLayer, ScanMaps, default_layer, scan_layers, scan_maps
from mmvmamba.analysis.scan_weights import KINDS
from mmvmamba.apis import run_command
from mmvmamba.apis.analysis_images import add_image_arguments, image_paths
from mmvmamba.apis.networks import add_network_arguments, networks_from
from mmvmamba.errors import ConfigError
from mmvmamba.optional import optional_package


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_network_arguments(parser, several=False)
    add_image_arguments(parser, shape=(224, 224), limit=None)
    parser.add_argument(
        "--pixel",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="the query, in the resized image (default: its middle)",
    )
    parser.add_argument(
        "--layer",
        nargs="+",
        metavar="NAME",
        help="layers of the backbone, or 'all' (default: the last one on a map of at least 12 x 12 cells)",
    )
    parser.add_argument("--list-layers", action="store_true", help="print the layers that scan, and end")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="which maps (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (0)")
    parser.add_argument(
        "--out-dir", default="work_dirs/scan_maps", help="where to write (default: work_dirs/scan_maps)"
    )
    return parser.parse_args()


def print_layers(layers: list[ScanLayer]) -> None:
    """Print names, maps and directions."""
    width = max(len(layer.name) for layer in layers)
    for layer in layers:
        print(f"{layer.name:<{width}}  {layer.rows:>4} x {layer.columns:<4}  {', '.join(layer.directions)}")


def print_maps(found: list[ScanMaps], kinds: list[str]) -> None:
    """Print where the sum of every layer comes from."""
    width = max(len(maps.layer) for maps in found)
    print(f"{'layer':<{width}}  {'kind':<8}{'sum':>12}  largest at (row, column); share of each direction")
    for maps in found:
        for kind in kinds:
            merged = maps.merged(kind)
            row, column = divmod(int(merged.argmax()), merged.shape[1])
            total = float(merged.sum())
            parts = zip(maps.directions, maps.maps[kind].sum((1, 2)).tolist(), strict=True)
            # No route of the layer may visit the query; then there is nothing to share.
            shares = ", ".join(f"{name} {part / total if total else 0:.0%}" for name, part in parts)
            print(f"{maps.layer:<{width}}  {kind:<8}{total:>12.4g}  ({row}, {column}); {shares}")


def main() -> None:
    """Run the network once and draw."""
    args = parse_args()
    folder = output_folder(args.out_dir)
    optional_package("matplotlib", "analysis")
    height, width = args.shape
    pixel = tuple(args.pixel) if args.pixel else (height // 2, width // 2)
    if not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ConfigError(f"--pixel is {pixel}, expected inside {height} x {width}, counted from 0. Correct it.")
    images = read_images(image_paths(args.images), height, width, limit=1)
    torch.manual_seed(args.seed)
    (network,) = networks_from(args)
    shown = network.normalised(images.to(next(network.model.parameters()).device))
    layers = scan_layers(network.backbone, shown)
    if args.list_layers:
        print_layers(layers)
        return
    names = [layer.name for layer in layers] if args.layer == ["all"] else args.layer or [default_layer(layers).name]
    with Console(stderr=True).status(f"{len(names)} of {len(layers)} layers of {network.name}"):
        found = scan_maps(network.backbone, shown, pixel, names)
    write(folder, found, args)
    picture = images[0].flip(0).permute(1, 2, 0).round().to(torch.uint8).numpy()
    draw_scan_maps(np.ascontiguousarray(picture), found, args.kind, folder / "scan_maps.png")
    print_maps(found, args.kind)
    print(f"\n{network.name}, {network.weights}; see {folder / 'scan_maps.png'}")


def write(folder: Path, found: list[ScanMaps], args: argparse.Namespace) -> None:
    """Write every map, and what they are in plain values."""
    np.savez_compressed(
        folder / "scan_maps.npz",
        **{f"{maps.layer}/{kind}": maps.maps[kind].numpy() for maps in found for kind in KINDS},
    )
    layers = [
        dict(
            layer=maps.layer,
            cell=maps.cell,
            shape=list(maps.maps["weight"].shape[1:]),
            directions=maps.directions,
            sums={kind: maps.maps[kind].sum((1, 2)).tolist() for kind in KINDS},
            on_other_tokens={kind: maps.elsewhere[kind].tolist() for kind in KINDS},
        )
        for maps in found
    ]
    about = dict(model=args.models[0], weights=args.weights, shape=args.shape, pixel=found[0].pixel, seed=args.seed)
    write_json(folder / "scan_maps.json", dict(about, torch=str(torch.__version__), layers=layers))


if __name__ == "__main__":
    run_command(main)
