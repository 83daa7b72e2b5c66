"""Count parameters and operations of a model: ``python tools/analysis_tools/get_flops.py MODEL [--backward]``.

Nothing is computed and no weights are read. Two conventions stand side by side: that of published tables (a
multiply-add of a product counts 1, a norm 5 per entry; it stands at the head of mmvmamba/analysis/flops.py) and
PyTorch's (a multiply-add counts 2, a norm nothing; mmvmamba/analysis/flop_passes.py), in which the backward can be
counted, too. With ``--out-dir`` get_flops.png, get_flops.csv (parts and stages) and get_flops.json are written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmengine.config import DictAction

from mmvmamba.analysis.flop_figures import flop_rows, save_flop_figure
from mmvmamba.analysis.flop_passes import PassesCost, count_passes
from mmvmamba.analysis.flops import PROPOSALS, ModelCost, count_model
from mmvmamba.analysis.outputs import output_folder, write_csv, write_json
from mmvmamba.apis import run_command
from mmvmamba.apis.networks import resolve_config
from mmvmamba.apis.overrides import check_overrides
from mmvmamba.optional import optional_package

SHAPES = {"mmpretrain": (224, 224), "mmdet": (1280, 800), "mmseg": (512, 2048)}
"""Height and width in the published tables, by the config's scope."""


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "config",
        metavar="MODEL",
        help="a config file, a name of the model index (configs/README.md), or a config of another package such as "
        "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py",
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the image (default: 224 224, for detectors 1280 800, for segmentors 512 2048)",
    )
    parser.add_argument("--backward", action="store_true", help="count the backward, too")
    parser.add_argument("--proposals", type=int, default=PROPOSALS, help=f"boxes of a two-stage detector ({PROPOSALS})")
    parser.add_argument("--out-dir", metavar="FOLDER", help="write a figure, a table and everything as JSON there")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="overwrite entries")
    return parser.parse_args()


def print_tables(cost: ModelCost, passes: PassesCost, height: int, width: int) -> None:
    """Print totals, the parts and stages in both conventions, and the operators for people."""
    print(f"input        {height} x {width}")
    print(f"parameters   {cost.parameters:,} ({cost.parameters / 1e6:.1f} M)")
    print(f"FLOPs        {cost.flops:,} ({cost.flops / 1e9:.1f} G); a multiply-add counts 1, as in published tables")
    print(f"forward      {_both(passes.forward.flops)}; a multiply-add counts 2, as torch.utils.flop_counter does")
    columns: list[Any] = [cost.by_row, passes.forward.by_row]
    titles = ["published tables", "PyTorch forward"]
    if passes.backward is not None:
        ratio = passes.backward.flops / passes.forward.flops
        print(f"backward     {_both(passes.backward.flops)}; {ratio:.2f} times the forward, in the same convention")
        columns.append(passes.backward.by_row)
        titles.append("backward")
    print(f"\n{'part or stage (G)':<36}" + "".join(f"{title:>20}" for title in titles))
    for name in cost.by_row:
        print(f"  {name:<34}" + "".join(f"{column.get(name, 0) / 1e9:>20.3f}" for column in columns))
    print("\noperator, in the convention of published tables")
    _print_operators(cost.by_operator)
    for title, one in (("forward", passes.forward), ("backward", passes.backward)):
        if one is not None:
            print(f"\noperator, {title} in PyTorch's convention")
            _print_operators(one.by_operator)
    print(f"\nnot counted in published tables: {', '.join(sorted(cost.uncounted))}")


def _both(count: int) -> str:
    return f"{count:,} ({count / 1e9:.1f} G)"


def _print_operators(counts: Any) -> None:
    for name, count in counts.items():
        print(f"  {name:<46}{count / 1e9:>10.3f} G")


def main() -> None:
    """Count."""
    args = parse_args()
    cfg, _, _ = resolve_config(None, args.config)
    if args.cfg_options:
        check_overrides(args.config, cfg, args.cfg_options)
        cfg.merge_from_dict(args.cfg_options)
    if args.out_dir:
        output_folder(args.out_dir)
        optional_package("matplotlib", "analysis")
    height, width = args.shape or SHAPES[cfg.default_scope]
    cost = count_model(cfg, height, width, proposals=args.proposals)
    passes = count_passes(cfg, height, width, proposals=args.proposals, backward=args.backward)
    print_tables(cost, passes, height, width)
    if args.out_dir:
        folder, name = Path(args.out_dir), Path(args.config).stem
        rows = flop_rows(cost, passes)
        content = dict(vars(cost), input=[height, width], pytorch_forward=vars(passes.forward))
        if passes.backward is not None:
            content["pytorch_backward"] = vars(passes.backward)
        write_json(folder / "get_flops.json", content)
        write_csv(folder / "get_flops.csv", rows)
        save_flop_figure(rows, f"{name}, {height} x {width}", folder / "get_flops.png")


if __name__ == "__main__":
    run_command(main)
