"""Count parameters and multiply-adds of a model: ``python tools/analysis_tools/get_flops.py CONFIG``.

Nothing is computed and no weights are read. The convention is that of published tables; it stands at the head of
mmvmamba/analysis/flops.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmengine.config import DictAction

from mmvmamba.analysis.flops import PROPOSALS, ModelCost, count_model
from mmvmamba.apis import load_config, run_command

SHAPES = {"mmpretrain": (224, 224), "mmdet": (1280, 800), "mmseg": (512, 2048)}
"""Height and width in the published tables, by the config's scope."""


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="config file of MMDetection, MMSegmentation or MMPretrain style")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the image (default: 224 224, for detectors 1280 800, for segmentors 512 2048)",
    )
    parser.add_argument("--proposals", type=int, default=PROPOSALS, help=f"boxes of a two-stage detector ({PROPOSALS})")
    parser.add_argument("--json", metavar="FILE", help="write everything to this file as well")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="overwrite entries")
    return parser.parse_args()


def print_table(cost: ModelCost, height: int, width: int) -> None:
    """Print totals and parts for people."""
    print(f"input        {height} x {width}")
    print(f"parameters   {cost.parameters:,} ({cost.parameters / 1e6:.1f} M)")
    print(f"FLOPs        {cost.flops:,} ({cost.flops / 1e9:.1f} G); a multiply-add counts 1")
    for title, counts in (("part", cost.by_part), ("operator", cost.by_operator)):
        print(f"\n{title}")
        for name, count in counts.items():
            print(f"  {name:<36}{count / 1e9:>12.3f} G")
    print(f"\nnot counted: {', '.join(sorted(cost.uncounted))}")


def main() -> None:
    """Count."""
    args = parse_args()
    cfg = load_config(args.config, cfg_options=args.cfg_options)
    height, width = args.shape or SHAPES[cfg.default_scope]
    cost = count_model(cfg, height, width, proposals=args.proposals)
    print_table(cost, height, width)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(dict(vars(cost), input=[height, width]), indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
