"""Cost against the side of the image, log-log: ``python tools/analysis_tools/scaling.py [MODEL...]``.

Multiply-adds, throughput and memory of every model at every side, and their slopes over the number of pixels: 1 is
linear. Without models: VMamba-T beside Swin-T and ConvNeXt-T of MMPretrain. What a model cannot take is said in the
table, and the run goes on. Writes scaling.png, scaling.csv and scaling.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from mmvmamba.analysis.environment import device_facts
from mmvmamba.analysis.memory import how_measured
from mmvmamba.analysis.outputs import new_figure, output_folder, save_figure, write_csv, write_json
from mmvmamba.analysis.scaling import SIDES, Point, check_sides, figure_of, scale, slopes
from mmvmamba.analysis.throughput import DTYPES, Settings
from mmvmamba.apis import run_command
from mmvmamba.apis.measured import BACKBONE, PARTS, measured_parts, measuring_device
from mmvmamba.apis.networks import add_network_arguments, networks_from
from mmvmamba.apis.progress import progress_of
from mmvmamba.errors import ConfigError

MODELS = (
    "vmamba-tiny-s1l8_8xb128_in1k",
    "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py",
    "mmpretrain::convnext/convnext-tiny_32xb128_in1k.py",
)
QUICK_SIDES = (224, 320, 448)


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_network_arguments(parser, default=MODELS)
    parser.add_argument("--part", choices=PARTS, default=BACKBONE, help=f"what is measured (default: {BACKBONE})")
    parser.add_argument(
        "--sides", type=int, nargs="+", metavar="N", help=f"height and width (default: {' '.join(map(str, SIDES))})"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images of a call (1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="for all models; autocast if not float32")
    parser.add_argument("--train", action="store_true", help="measure training steps instead of forwards")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each side, all models together (20)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's choice)")
    parser.add_argument(
        "--quick", action="store_true", help=f"2 seconds for each of the sides {' '.join(map(str, QUICK_SIDES))}"
    )
    parser.add_argument("--out-dir", default="work_dirs/scaling", help="work_dirs/scaling")
    return parser.parse_args()


def print_tables(points: Sequence[Point]) -> None:
    """Print a line for each point, then the slopes."""
    width = max(len(point.model) for point in points)
    print(f"{'model':<{width}}{'side':>6}{'G multiply-adds':>17}{'images/s':>11}{'added MiB':>11}")
    for point in points:
        flops = "-" if point.flops is None else f"{point.flops / 1e9:.2f}"
        speed = "-" if point.images_per_second is None else f"{point.images_per_second:.2f}"
        memory = "-" if point.step_bytes is None else f"{point.step_bytes / 2**20:.0f}"
        print(f"{point.model:<{width}}{point.side:>6}{flops:>17}{speed:>11}{memory:>11}  {point.problem}".rstrip())
    print(f"\n{'slope over pixels':<{width}}{'multiply-adds':>15}{'time':>8}{'memory':>8}")
    for row in slopes(points):
        numbers = [row[name] for name in ("flops", "time", "memory")]
        shown = [f"{'-' if n is None else format(n, '.2f'):>{w}}" for n, w in zip(numbers, (15, 8, 8), strict=True)]
        print(f"{row['model']:<{width}}{''.join(shown)}")


def main() -> None:
    """Measure."""
    args = parse_args()
    device = measuring_device(args.device)
    settings = Settings(args.dtype, device, 2.0 if args.quick else args.seconds, most_rounds=50)
    sides = args.sides or (QUICK_SIDES if args.quick else SIDES)
    check_sides(sides, args.batch)
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"threads is {args.threads}, expected at least 1. Correct it.")
    new_figure()
    folder = output_folder(args.out_dir)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    networks = networks_from(args)
    if args.part != BACKBONE and any(network.task == "det" for network in networks):
        raise ConfigError(
            "a whole detector is asked for, expected a backbone, a classifier or a segmentor: its number of boxes is "
            "not a matter of the image's size. Choose --part backbone."
        )
    subjects = measured_parts(networks, args.part, train=args.train)
    torch.manual_seed(0)
    with progress_of("sides", len(sides)) as advance:
        points = scale(subjects, sides, settings, batch=args.batch, train=args.train, done=advance)
    facts = device_facts(device)
    print_tables(points)
    print(f"memory: {how_measured(device)}")
    rows = [point.row() for point in points]
    write_csv(folder / "scaling.csv", rows)
    content = {"part": args.part, "environment": facts, "memory": how_measured(device)}
    write_json(folder / "scaling.json", content | {"slopes": slopes(points), "points": rows})
    step = "training steps" if args.train else "forwards"
    title = f"{step} of the {args.part}, {args.dtype}, batch {args.batch}, {facts['device']}"
    save_figure(figure_of(points, title), folder / "scaling.png")
    print(f"written to {folder}: scaling.png, scaling.csv, scaling.json")


if __name__ == "__main__":
    run_command(main)
