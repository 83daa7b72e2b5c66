"""Cut a small data set out of one in ADE20K's layout: ``python tools/dataset_converters/ade20k_subset.py ROOT OUT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmvmamba.datasets.subsets import Choice, subset_ade20k
from mmvmamba.errors import DataError


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("root", type=Path, help="the data set")
    parser.add_argument("out", type=Path, help="the small one; other splits can be added to it later")
    parser.add_argument("--images", default="images/training", help="folder in it (default: %(default)s)")
    parser.add_argument("--labels", default="annotations/training", help="folder in it (default: %(default)s)")
    parser.add_argument("--count", type=int, default=100, help="how many images (default: %(default)s)")
    parser.add_argument(
        "--containing", type=int, nargs="+", metavar="LABEL", help="only images with one of these values in the labels"
    )
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    parser.add_argument("--link", action="store_true", help="make symbolic links instead of copies")
    return parser.parse_args()


def main() -> int:
    """Cut the data set and return the exit code."""
    args = parse_args()
    try:
        choice = Choice(args.count, args.seed, args.link)
        images = subset_ade20k(
            args.root, args.out, images=args.images, labels=args.labels, choice=choice, containing=args.containing
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {images} images with labels from {args.root / args.images}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
