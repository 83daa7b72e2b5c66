"""Accuracy against the size of the image, without finetuning: ``accuracy_scaling.py [MODEL... --weights FILE...]``.

Each model is tested by its own runner, data set and metrics, at sizes that it was not trained for. The size is the side
of squares for a classifier, and the shorter side of the images for a detector or segmentor, whose answers are compared
with the truth at the images' own size; mmvmamba/analysis/accuracy_scaling.py says how pipelines are changed. Without
models: the demo's three, trained on digits (python tools/demo.py). Writes accuracy_scaling.png, .csv and .json.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction

from mmvmamba.analysis.accuracy_scaling import figure_of
from mmvmamba.analysis.environment import environment
from mmvmamba.analysis.outputs import new_figure, output_folder, save_figure, write_csv, write_json
from mmvmamba.apis import run_command
from mmvmamba.apis.accuracy import SizeTest, Trained, demo_models, evaluate_at_sizes, trained_models
from mmvmamba.apis.demo import QUICK_DATA
from mmvmamba.apis.progress import progress_of
from mmvmamba.datasets import DigitsSettings, write_digits
from mmvmamba.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SQUARES, SHORTER_SIDES = (32, 48, 64, 96, 128, 192), (96, 128, 160, 192, 256, 320)
QUICK_SQUARES, QUICK_SHORTER_SIDES = (48, 64, 96), (96, 128, 192)


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names of the model index or config files")
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="a checkpoint for each model, in the same order")
    parser.add_argument("--demo-dir", default="work_dirs/demo", help="the demo's work folder (work_dirs/demo)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="N",
        help=f"for all models (default: squares of {' '.join(map(str, SQUARES))} for classifiers, shorter sides of "
        f"{' '.join(map(str, SHORTER_SIDES))} for the others)",
    )
    parser.add_argument("--data-root", help="the data set (default: the config's; of the demo's models data/digits)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="overwrite entries")
    parser.add_argument("--quick", action="store_true", help="three sizes; of the demo's models 8 pictures")
    parser.add_argument("--out-dir", default="work_dirs/accuracy_scaling", help="work_dirs/accuracy_scaling")
    return parser.parse_args()


def _models(args: argparse.Namespace) -> list[Trained]:
    """Return the models of a command line; the demo's data set is made if it is absent."""
    if args.models:
        if args.weights is None:
            raise ConfigError("--weights is missing, expected a checkpoint for each model. Name them.")
        return trained_models(args.models, args.weights, cfg_options=args.cfg_options, data_root=args.data_root)
    if args.weights is not None:
        raise ConfigError("--weights is given without a model, expected one for each of its files. Name the models.")
    models, weights = demo_models(ROOT, Path(args.demo_dir))
    root = args.data_root or ("data/digits-quick" if args.quick else "data/digits")
    found = trained_models(models, weights, cfg_options=args.cfg_options, data_root=f"{root}/")
    if args.data_root is None:
        write_digits(root, QUICK_DATA if args.quick else DigitsSettings())
    return found


def _sizes(args: argparse.Namespace, trained: Trained) -> Sequence[int]:
    if args.sizes:
        return sorted(set(args.sizes))
    if trained.cfg.default_scope == "mmpretrain":
        return QUICK_SQUARES if args.quick else SQUARES
    return QUICK_SHORTER_SIDES if args.quick else SHORTER_SIDES


def print_table(tests: Sequence[SizeTest]) -> None:
    """Print a line for each number that the figure shows."""
    rows = [row for test in tests for row in test.rows()]
    width = max(len(row["model"]) for row in rows)
    print(f"{'model':<{width}}{'size':>6}{'':>4}metric")
    for row in rows:
        print(f"{row['model']:<{width}}{row['size']:>6}    {row['label'].removesuffix(', %')} {row['value']:.1f} %")


def main() -> None:
    """Test."""
    args = parse_args()
    new_figure()
    folder = output_folder(args.out_dir)
    models = _models(args)
    sizes = [_sizes(args, trained) for trained in models]
    # What loading and COCO's evaluation print goes where the bar goes.
    with contextlib.redirect_stdout(sys.stderr), progress_of("tests", sum(map(len, sizes))) as advance:
        tests = evaluate_at_sizes(models, sizes, folder / "tests", advance)
    rows = [row for test in tests for row in test.rows()]
    if not rows:
        raise ConfigError(
            f"the tests gave {', '.join(tests[0].metrics)}, expected accuracy/top1, coco/bbox_mAP or mIoU. Choose a "
            "test_evaluator that computes one of them."
        )
    print_table(tests)
    write_csv(folder / "accuracy_scaling.csv", rows)
    content = {"environment": environment(), "weights": {each.name: each.checkpoint for each in models}}
    every = [{"model": test.model, "size": test.size, "metrics": test.metrics} for test in tests]
    write_json(folder / "accuracy_scaling.json", content | {"tests": every})
    save_figure(figure_of(rows), folder / "accuracy_scaling.png")
    print(f"written to {folder}: accuracy_scaling.png, accuracy_scaling.csv, accuracy_scaling.json")


if __name__ == "__main__":
    run_command(main)
