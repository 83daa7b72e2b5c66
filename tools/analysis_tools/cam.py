"""Class activation maps: ``python tools/analysis_tools/cam.py MODEL --weights FILE [--method GradCAM ...]``.

Which parts of a picture speak for a class, by the methods of the grad-cam package, for classifiers, detectors and
segmentors; mmvmamba/analysis/class_scores.py says what the score of a class is for each. Writes cam.png, cam.json and
cam.npz, which has every map.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from mmvmamba.analysis.cam import METHODS, ActivationMap, activation_maps, check_methods, draw_activation_maps
from mmvmamba.analysis.images import read_images
from mmvmamba.analysis.outputs import output_folder, write_json
from mmvmamba.apis import run_command
from mmvmamba.apis.analysis_images import add_image_arguments, image_paths
from mmvmamba.apis.networks import add_network_arguments, networks_from
from mmvmamba.optional import optional_package


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_network_arguments(parser, several=False)
    add_image_arguments(parser, shape=(224, 224), limit=3)
    parser.add_argument(
        "--method",
        nargs="+",
        default=["GradCAM", "LayerCAM", "EigenCAM"],
        metavar="NAME",
        help=f"one or more of {', '.join(METHODS)} (default: GradCAM LayerCAM EigenCAM)",
    )
    parser.add_argument(
        "--class", dest="label", type=int, metavar="NUMBER", help="from 0 (default: what the network is surest of)"
    )
    parser.add_argument("--stage", type=int, default=-1, help="which map of the backbone, from 0 (default: the last)")
    parser.add_argument("--layer", metavar="NAME", help="a block of the backbone instead, such as layers.2.blocks.1")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (0)")
    parser.add_argument("--out-dir", default="work_dirs/cam", help="where to write (default: work_dirs/cam)")
    return parser.parse_args()


def main() -> None:
    """Look at every picture and draw."""
    args = parse_args()
    check_methods(args.method)
    folder = output_folder(args.out_dir)
    for package in ("matplotlib", "pytorch_grad_cam"):
        optional_package(package, "analysis")
    images = read_images(image_paths(args.images), *args.shape, limit=args.limit)
    torch.manual_seed(args.seed)
    (network,) = networks_from(args)
    device = next(network.model.parameters()).device
    found: list[list[ActivationMap]] = [
        activation_maps(
            network.model,
            network.task,
            network.normalised(image[None].to(device)),
            args.method,
            label=args.label,
            stage=args.stage,
            layer=args.layer,
        )
        for image in track(images, network.name, console=Console(stderr=True), transient=True)
    ]
    pictures = [np.ascontiguousarray(image.flip(0).permute(1, 2, 0).byte().numpy()) for image in images]
    draw_activation_maps(list(zip(pictures, found, strict=True)), folder / "cam.png")
    write(folder / "cam.npz", found)
    rows = [
        dict(image=number, method=cam.method, label=cam.label, score=cam.score, peak=peak(cam))
        for number, maps in enumerate(found)
        for cam in maps
    ]
    about = dict(model=args.models[0], weights=args.weights, shape=args.shape, stage=args.stage, layer=args.layer)
    write_json(folder / "cam.json", dict(about, torch=str(torch.__version__), maps=rows))
    print(f"{'image':>5}  {'method':<20}{'class':>6}{'score':>9}  largest at (row, column)")
    for row in rows:
        print(f"{row['image']:>5}  {row['method']:<20}{row['label']:>6}{row['score']:>9.2f}  {row['peak']}")
    print(f"\n{network.name}, {network.weights}; see {folder / 'cam.png'}")


def peak(cam: ActivationMap) -> tuple[int, int]:
    """Return where a map is largest."""
    row, column = np.unravel_index(int(cam.values.argmax()), cam.values.shape)
    return int(row), int(column)


def write(path: Path, found: list[list[ActivationMap]]) -> None:
    """Write every map."""
    maps = {f"{number}/{cam.method}": cam.values for number, cams in enumerate(found) for cam in cams}
    np.savez_compressed(path, **maps)


if __name__ == "__main__":
    run_command(main)
