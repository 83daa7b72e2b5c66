"""Test a network with an exported part: ``python tools/deployment/test_exported.py CONFIG CHECKPOINT FILE``.

The runner's own test, with the part that ``tools/deployment/export.py`` wrote in the place of PyTorch's. What the part
does not contain (a detector's heads, a segmentor's softmax) is the checkpoint's, in PyTorch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmvmamba.analysis.outputs import output_folder, write_json
from mmvmamba.apis import (
    add_shared_arguments,
    build_runner,
    check_data,
    check_weights,
    load_config,
    prepare_testing,
    run_command,
)
from mmvmamba.apis.deployment import load_exported, put_into
from mmvmamba.apis.networks import SCOPES
from mmvmamba.errors import ConfigError
from mmvmamba.models.pretrained import read_weights


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="config file of MMDetection, MMSegmentation or MMPretrain style")
    parser.add_argument("checkpoint", help="the weights that were exported")
    parser.add_argument("exported", help="what tools/deployment/export.py wrote: a .pt2 or .onnx file")
    parser.add_argument("--compare", action="store_true", help="test PyTorch's network first, and print both")
    parser.add_argument("--work-dir", help="where logs and metrics.json go (default: work_dirs/<config name>)")
    add_shared_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Test."""
    args = parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = load_config(args.config, work_dir=args.work_dir, cfg_options=args.cfg_options, launcher=args.launcher)
    prepare_testing(cfg, args.checkpoint)
    exported = load_exported(args.exported)
    if SCOPES[exported.task] != cfg.default_scope:
        raise ConfigError(
            f"{args.exported!r} is a part of a network of the task {exported.task!r}, but {args.config!r} is for "
            f"{cfg.default_scope}. Name the config that was exported."
        )
    check_data(cfg, ["test"])
    folder = output_folder(cfg.work_dir)
    weights = read_weights(args.checkpoint)  # before anything is built: a bad file is known at once
    runner = build_runner(cfg)
    check_weights(runner.model, args.checkpoint, weights)
    del weights
    results = {}
    if args.compare:
        results["pytorch"] = _plain(runner.test())
    runner.load_or_resume()  # before the part is replaced: it has none of the names of the checkpoint
    put_into(runner.model, exported)
    results["exported"] = _plain(runner.test())
    write_json(folder / "metrics.json", results)
    print_table(results)


def _plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics without NumPy's types, which JSON does not know; a metric that is no number is left out."""
    numbers = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
    return {name: value for name, value in numbers.items() if np.isfinite(value)}


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Print the metrics of every test beside each other."""
    names = list(next(iter(results.values())))
    print("\n" + " " * 32 + "".join(f"{column:>12}" for column in results))
    for name in names:
        print(f"{name:<32}" + "".join(f"{values[name]:>12.4f}" for values in results.values()))


if __name__ == "__main__":
    run_command(main)
