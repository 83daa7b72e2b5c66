"""Export a network for other programs: ``python tools/deployment/export.py MODEL --weights FILE --format onnx``.

Written are the file and, beside it, a JSON file with what it takes (sizes, mean, standard deviation, order of colours),
what it gives and how it compared with PyTorch at random image sizes. docs/tutorials/deploy.md shows how to load it.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from mmvmamba.analysis.outputs import output_folder
from mmvmamba.apis import run_command
from mmvmamba.apis.deployment import FORMATS, Export, ExportRequest, export_network
from mmvmamba.apis.networks import add_network_arguments, networks_from
from mmvmamba.deployment.checks import TOLERANCE
from mmvmamba.deployment.parts import PARTS
from mmvmamba.deployment.programs import DIMENSIONS, EXAMPLE_SIDES
from mmvmamba.errors import ConfigError

_QUICK_IMAGES = 3


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_network_arguments(parser, several=False)
    parser.add_argument("--part", choices=list(PARTS), default="backbone", help="what to export (default: backbone)")
    parser.add_argument(
        "--format", choices=list(FORMATS), default="torch", help="default: torch, a torch.export program"
    )
    parser.add_argument(
        "--fixed",
        nargs="+",
        choices=DIMENSIONS,
        default=[],
        help="dimensions that stay as recorded (default: none, so any batch, height and width)",
    )
    parser.add_argument(
        "--sides",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        default=EXAMPLE_SIDES,
        help="the image to record with (default: %(default)s); free sides may have another size later",
    )
    parser.add_argument("--int8", action="store_true", help="linear maps in 8-bit integers (torchao); not for onnx")
    parser.add_argument("--images", type=int, default=20, help="random sizes to compare with PyTorch (default: 20)")
    parser.add_argument("--repeats", type=int, default=5, help="timings at each size; 0 takes none (default: 5)")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest relative difference (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help=f"compare {_QUICK_IMAGES} sizes, once each")
    parser.add_argument("--out-dir", default="work_dirs/export", help="default: %(default)s")
    return parser.parse_args()


def print_table(export: Export, *, int8: bool) -> None:
    """Print what was made for people."""
    print(f"\nwritten      {export.file} ({export.megabytes:.1f} MB, {export.seconds:.0f} s)")
    print(f"described    {export.description}")
    for name in DIMENSIONS:
        low, high = export.sizes.get(name, (None, None))
        text = "as recorded" if low is None else f"{low} or more" if high is None else f"{low} to {high}"
        print(f"{name:<13}{text}")
    if int8:
        print(f"int8         {export.quantised} linear maps; the difference is that from the float network")
    print(f"\n{'batch (b, c, h, w)':<22}{'difference':>12}{'PyTorch':>12}{'exported':>12}")
    for run in export.runs:
        times = "".join(f"{'' if ms is None else f'{ms:.1f} ms':>12}" for ms in (run.pytorch_ms, run.exported_ms))
        print(f"{' x '.join(map(str, run.shape)):<22}{run.error:>12.1e}{times}")
    ratios = [run.pytorch_ms / run.exported_ms for run in export.runs if run.pytorch_ms and run.exported_ms]
    line = f"\nlargest difference {max(run.error for run in export.runs):.1e}"
    if ratios:
        line += f"; PyTorch's time over the exported one's: median {statistics.median(ratios):.2f}"
    print(line)


def _say(line: str) -> None:
    sys.stderr.write(f"{line} ...\n")


def main() -> None:
    """Export."""
    args = parse_args()
    if args.device not in (None, "cpu"):
        raise ConfigError(f"--device is {args.device!r}, expected cpu: exports are made for it. Leave it out.")
    args.device = "cpu"
    request = ExportRequest(
        part=args.part,
        format=args.format,
        dynamic=tuple(name for name in DIMENSIONS if name not in args.fixed),
        int8=args.int8,
        sides=tuple(args.sides),
        images=_QUICK_IMAGES if args.quick else args.images,
        repeats=1 if args.quick else args.repeats,
        tolerance=args.tolerance,
    )
    request.check()
    folder = output_folder(args.out_dir)
    (network,) = networks_from(args)
    sys.stderr.write(f"{network.name}: {network.weights}\n")
    export = export_network(network, request, folder, _say)
    print_table(export, int8=args.int8)


if __name__ == "__main__":
    run_command(main)
