"""Cut a few images of each class out of ImageNet: ``python tools/dataset_converters/imagenet_subset.py ROOT OUT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmvmamba.datasets.subsets import Choice, subset_imagenet
from mmvmamba.errors import DataError


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("root", type=Path, help="the data set")
    parser.add_argument("out", type=Path, help="the small one; other splits can be added to it later")
    parser.add_argument("--folder", default="train", help="split in it, with a folder per class (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10, help="how many images of each class (default: %(default)s)")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="FOLDER",
        help="folders to take images from; the others stay empty (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    parser.add_argument("--link", action="store_true", help="make symbolic links instead of copies")
    return parser.parse_args()


def main() -> int:
    """Cut the data set and return the exit code."""
    args = parse_args()
    try:
        choice = Choice(args.count, args.seed, args.link)
        classes, images = subset_imagenet(args.root, args.out, folder=args.folder, choice=choice, classes=args.classes)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {images} images of {classes} classes from {args.root / args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
