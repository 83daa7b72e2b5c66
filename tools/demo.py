"""Train, test and draw a VMamba classifier, detector and segmentor: ``python tools/demo.py [--quick]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmvmamba.apis.demo import run_demo
from mmvmamba.errors import MMVMambaError


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description="The demo on the digits data set.")
    parser.add_argument("--quick", action="store_true", help="a few iterations on a few pictures")
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="results folder; those of an earlier demo in it are replaced (default: work_dirs/demo, with --quick "
        "work_dirs/demo-quick)",
    )
    parser.add_argument(
        "--data-root", type=Path, help="data folder (default: data/digits, with --quick data/digits-quick)"
    )
    return parser.parse_args()


def main() -> int:
    """Run the demo."""
    args = parse_args()
    data_root = args.data_root or Path("data/digits-quick" if args.quick else "data/digits")
    work_dir = args.work_dir or Path("work_dirs/demo-quick" if args.quick else "work_dirs/demo")
    try:
        run_demo(Path(__file__).resolve().parents[1], work_dir, data_root, args.quick)
    except MMVMambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
