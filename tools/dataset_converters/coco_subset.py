"""Cut a small data set out of one in COCO's format: ``python tools/dataset_converters/coco_subset.py ROOT OUT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmvmamba.datasets.subsets import Choice, subset_coco
from mmvmamba.errors import DataError


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("root", type=Path, help="the data set")
    parser.add_argument("out", type=Path, help="the small one; other splits can be added to it later")
    parser.add_argument(
        "--annotations", default="annotations/instances_train2017.json", help="file in it (default: %(default)s)"
    )
    parser.add_argument("--images", default="train2017", help="folder in it (default: %(default)s)")
    parser.add_argument("--count", type=int, default=100, help="how many images (default: %(default)s)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="categories to keep (default: all)")
    parser.add_argument("--keep-empty", action="store_true", help="also choose images without objects")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    parser.add_argument("--link", action="store_true", help="make symbolic links instead of copies")
    return parser.parse_args()


def main() -> int:
    """Cut the data set and return the exit code."""
    args = parse_args()
    try:
        choice = Choice(args.count, args.seed, args.link)
        images, annotations = subset_coco(
            args.root, args.out, annotations=args.annotations, images=args.images, choice=choice,
            classes=args.classes, keep_empty=args.keep_empty,
        )  # fmt: skip
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {images} images with {annotations} annotations from {args.root / args.annotations}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
