"""Effective receptive fields: ``python tools/analysis_tools/erf.py MODEL [MODEL ...] [--weights FILE ...]``.

The field before and after training, in one figure: name a model twice, ``--weights random FILE``. Any backbone of ours,
MMDetection, MMSegmentation or MMPretrain that returns maps can be compared. Writes erf.png, erf.csv (area ratios),
erf.json and, for each model, erf_<number>.npy, the field itself. mmvmamba/analysis/erf.py says what is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from mmvmamba.analysis.erf import (
    SHARES,
    Field,
    check_stage,
    contribution_areas,
    draw_fields,
    effective_receptive_field,
)
from mmvmamba.analysis.images import read_images
from mmvmamba.analysis.outputs import output_folder, write_csv, write_json
from mmvmamba.apis import run_command
from mmvmamba.apis.analysis_images import add_image_arguments, image_paths
from mmvmamba.apis.networks import RANDOM, Network, add_network_arguments, networks_from
from mmvmamba.optional import optional_package

SHAPE, LIMIT = (512, 512), 24
QUICK_SHAPE, QUICK_LIMIT = [224, 224], 4


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_network_arguments(parser)
    add_image_arguments(parser, shape=SHAPE, limit=LIMIT)
    parser.add_argument("--stage", type=int, default=-1, help="which map of the backbone, from 0 (default: the last)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (0)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_LIMIT} images of {QUICK_SHAPE[0]} x {QUICK_SHAPE[1]}"
    )
    parser.add_argument("--out-dir", default="work_dirs/erf", help="where to write (default: work_dirs/erf)")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.limit = QUICK_SHAPE, QUICK_LIMIT
    return args


def title_of(network: Network, weights: str) -> str:
    """Return the heading of a panel."""
    return f"{network.name}\n{'random weights' if weights == RANDOM else Path(weights).name}"


def measure(network: Network, images: torch.Tensor, stage: int) -> Field:
    """Return the field of a network, image by image: a batch would need the memory of all."""
    device = next(network.model.parameters()).device
    batches = (network.normalised(image[None].to(device)) for image in images)
    watched = track(batches, network.name, total=len(images), console=Console(stderr=True), transient=True)
    return effective_receptive_field(network.backbone, watched, stage)


def rows_of(number: int, title: str, field: Field) -> list[dict]:
    """Return the lines of the table about a model."""
    model, weights = title.split("\n")
    about = dict(number=number, model=model, weights=weights)
    return [
        dict(about, share=area.share, side=area.side, area_ratio=round(area.area_ratio, 6))
        for area in contribution_areas(field)
    ]


def main() -> None:
    """Measure, print and draw."""
    args = parse_args()
    folder = output_folder(args.out_dir)
    optional_package("matplotlib", "analysis")
    images = read_images(image_paths(args.images), *args.shape, limit=args.limit)
    torch.manual_seed(args.seed)
    networks = networks_from(args)
    for network in networks:
        check_stage(network.backbone, args.stage, tuple(args.shape))
    weights = args.weights or [RANDOM] * len(networks)
    titles = [title_of(network, name) for network, name in zip(networks, weights, strict=True)]
    fields, rows = [], []
    for number, (title, network) in enumerate(zip(titles, networks, strict=True)):
        field = measure(network, images, args.stage)
        fields.append((title, field))
        np.save(folder / f"erf_{number}.npy", field.values.float().numpy())
        rows.extend(rows_of(number, title, field))
    write_csv(folder / "erf.csv", rows)
    settings = dict(images=len(images), height=args.shape[0], width=args.shape[1], stage=args.stage, seed=args.seed)
    write_json(folder / "erf.json", dict(settings, torch=str(torch.__version__), areas=rows))
    draw_fields(fields, folder / "erf.png")
    print_table(titles, rows)
    print(f"\n{len(images)} images of {args.shape[0]} x {args.shape[1]}; see {folder / 'erf.png'}")


def print_table(titles: list[str], rows: list[dict]) -> None:
    """Print how much of the image holds how much of each field."""
    width = max(len(title.replace("\n", ", ")) for title in titles)
    print("part of the image in the smallest square around the centre that holds so much of the field (its side)")
    print(" " * width + "".join(f"{f't = {share:.0%}':>18}" for share in SHARES))
    for number, title in enumerate(titles):
        own = [row for row in rows if row["number"] == number]
        cells = (f"{row['area_ratio']:.1%} ({row['side']})" for row in own)
        print(f"{title.replace(chr(10), ', '):<{width}}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    run_command(main)
