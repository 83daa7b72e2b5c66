"""Check a data set before a training: ``python tools/check_dataset.py CONFIG``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mmengine.config import DictAction

from mmvmamba.apis import load_config, run_command
from mmvmamba.apis.dataset_checks import DataCheck
from mmvmamba.datasets.checks import MAX_PIXELS, MAX_SKIPPED, CocoUse, PictureOptions, check_class_list, compare_classes
from mmvmamba.errors import ConfigError, DataError

#: So many pictures are looked at before anybody asks how far it is.
_SMALL = 200


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="config file whose data sets are checked")
    parser.add_argument("--splits", nargs="+", choices=["train", "val", "test"], default=["train", "val"])
    parser.add_argument("--coco", metavar="ANN_FILE", help="check this COCO file instead of a config")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the pictures of --coco; without it, none is looked at"
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="the classes --coco must have, in this order")
    parser.add_argument("--no-masks", action="store_true", help="--coco is for boxes only")
    parser.add_argument("--ade20k", metavar="ROOT", help="check this folder in ADE20K's layout instead of a config")
    parser.add_argument("--imagenet", metavar="ROOT", help="check this folder in ImageNet's layout instead of a config")
    parser.add_argument("--no-pictures", action="store_true", help="look only at annotation files")
    parser.add_argument(
        "--policy", choices=["error", "skip"], default="error",
        help="skip: write lists without what is bad into --out (default: error)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where --policy skip writes")
    parser.add_argument(
        "--max-skipped", type=float, default=MAX_SKIPPED, metavar="SHARE",
        help="largest share of images or annotations to leave out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger pictures are refused undecoded")
    parser.add_argument("--workers", type=int, help="threads that decode pictures (default: up to 4)")
    parser.add_argument("--report", metavar="FILE.json", help="write the report as JSON, too")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="overwrite config entries"
    )
    return parser.parse_args()


def show_progress(what: str, done: int, total: int) -> None:
    """Print one line per tenth of the work, unless it is small."""
    if total > _SMALL and (done == total or done * 10 // total > (done - 1) * 10 // total):
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise for arguments that do not go together."""
    sources = [name for name in ("config", "coco", "ade20k", "imagenet") if getattr(args, name) is not None]
    if len(sources) != 1:
        found = " and ".join(sources) or "nothing to check"
        raise ConfigError(f"found {found}, expected one of CONFIG, --coco, --ade20k and --imagenet. Name one.")
    for name in ("images", "classes"):
        if getattr(args, name) is not None and args.coco is None:
            raise ConfigError(f"--{name}: found without --coco, expected with it. Drop it: a config has its own.")
    if (args.policy == "skip") != (args.out is not None):
        raise ConfigError("--policy skip and --out: found one of the two, expected both or none. Add the other one.")
    if not 0 <= args.max_skipped <= 1:
        raise ConfigError(f"--max-skipped is {args.max_skipped}, expected a share of 0 to 1.")
    for name in ("workers", "max_pixels"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected 1 or more.")


def run_check(args: argparse.Namespace) -> DataCheck:
    """Check what the arguments name."""
    workers = args.workers or min(4, os.cpu_count() or 1)
    check = DataCheck(options=None if args.no_pictures else PictureOptions(args.max_pixels, workers, show_progress))
    if args.config is not None:
        check.config(load_config(args.config, cfg_options=args.cfg_options), args.splits)
    elif args.ade20k is not None:
        check.ade20k(Path(args.ade20k))
    elif args.imagenet is not None:
        check.imagenet(Path(args.imagenet))
    else:
        images = None if args.images is None else Path(args.images)
        coco = check.coco(Path(args.coco), images, "coco", CocoUse(masks=False if args.no_masks else None))
        if args.classes is not None and coco.document is not None:
            problems = check_class_list(args.classes) or compare_classes(args.classes, list(coco.names.values()))
            for kind, text in problems:
                check.report.add(kind, args.coco, "--classes", text)
    return check


def main() -> None:
    """Check."""
    args = parse_args()
    check_arguments(args)
    check = run_check(args)
    print(check.report.text())
    if args.report is not None:
        check.report.write(args.report)
    if args.policy == "skip":
        for kept in check.keep(Path(args.out).absolute(), args.max_skipped):
            print(f"written: {kept.line()}")
    elif check.report.errors:
        raise DataError(
            f"the data set has {check.report.errors_in_words()}, expected none. The report above has the cures."
        )


if __name__ == "__main__":
    run_command(main)
