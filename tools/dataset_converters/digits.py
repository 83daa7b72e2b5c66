"""Make the digits data set: ``python tools/dataset_converters/digits.py --out data/digits``."""

from __future__ import annotations

import argparse
import sys

from mmvmamba.datasets import DigitsSettings, write_digits
from mmvmamba.errors import DataError


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    defaults = DigitsSettings()
    parser = argparse.ArgumentParser(description="Make the digits data set (COCO, ADE20K-style labels, crops).")
    parser.add_argument("--out", default="data/digits", help="folder to make (default: %(default)s)")
    parser.add_argument("--train", type=int, default=defaults.train, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=defaults.val, help="validation scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="random seed (default: %(default)s)")
    parser.add_argument("--train-crops", type=int, default=defaults.train_crops, help="(default: %(default)s)")
    parser.add_argument("--val-crops", type=int, default=defaults.val_crops, help="(default: %(default)s)")
    return parser.parse_args()


def show_progress(what: str, done: int, total: int) -> None:
    """Print one line per tenth of the work."""
    if done == total or done * 10 // total > (done - 1) * 10 // total:
        print(f"digits: {what} {done}/{total}", flush=True)


def main() -> int:
    """Make the data set."""
    args = parse_args()
    try:
        settings = DigitsSettings(args.train, args.val, args.seed, args.train_crops, args.val_crops)
        written = write_digits(args.out, settings, show_progress)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"digits: {args.out} {'is complete' if written else 'was already complete, nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
