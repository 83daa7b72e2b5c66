"""Convert an official checkpoint to mmvmamba's names, or back: ``python tools/convert_checkpoint.py SOURCE TARGET``."""

from __future__ import annotations

import argparse
import sys

from mmvmamba.converters.files import convert_file, restore_file
from mmvmamba.errors import MMVMambaError


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("source", help="a file or an https URL")
    parser.add_argument("target", help="a new file, .safetensors or .pth; a manifest is written beside it")
    parser.add_argument("--to-upstream", action="store_true", help="write the official layout (.pth) of a file of ours")
    parser.add_argument("--section", help="entry of SOURCE that holds the weights, such as model_ema")
    parser.add_argument("--sha256", metavar="HEX", help="what SOURCE must hash to, 64 digits")
    args = parser.parse_args()
    if args.to_upstream and args.section:
        parser.error("--section belongs to official files; drop it or --to-upstream")
    return args


def main() -> None:
    """Convert."""
    args = parse_args()
    if args.to_upstream:
        done = restore_file(args.source, args.target, sha256=args.sha256)
    else:
        done = convert_file(args.source, args.target, section=args.section, sha256=args.sha256)
    print(done.line())


if __name__ == "__main__":
    try:
        main()
    except MMVMambaError as error:
        sys.exit(f"error: {error}")
