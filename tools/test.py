"""Test a detector, segmentor or classifier: ``python tools/test.py CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse
import os

from mmvmamba.analysis.tables import class_table
from mmvmamba.apis import (
    add_shared_arguments,
    build_runner,
    check_data,
    check_weights,
    load_config,
    prepare_testing,
    run_command,
)
from mmvmamba.apis.runner import PER_CLASS
from mmvmamba.models.pretrained import read_weights


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="config file of MMDetection, MMSegmentation or MMPretrain style")
    parser.add_argument("checkpoint", help="weights to test")
    parser.add_argument("--work-dir", help="where logs and metrics go (default: work_dirs/<config name>)")
    parser.add_argument("--out", help="save predictions: a .pkl file (mmdet, mmpretrain) or a folder (mmseg)")
    parser.add_argument("--show-dir", help="folder for drawn predictions")
    parser.add_argument(
        "--per-class", action="store_true", help="a table of all classes (of a segmentor, it always is printed)"
    )
    parser.add_argument("--tta", action="store_true", help="use test-time augmentation")
    add_shared_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Test."""
    args = parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = load_config(args.config, work_dir=args.work_dir, cfg_options=args.cfg_options, launcher=args.launcher)
    prepare_testing(cfg, args.checkpoint, out=args.out, show_dir=args.show_dir, tta=args.tta,
                    per_class=args.per_class)  # fmt: skip
    check_data(cfg, ["test"])
    weights = read_weights(args.checkpoint)  # before anything is built: a bad file is known at once
    runner = build_runner(cfg)
    check_weights(runner.model, args.checkpoint, weights)
    del weights
    metrics = runner.test()
    table = class_table(metrics, PER_CLASS, runner.test_dataloader.dataset.metainfo.get("classes") or ())
    if table is not None:
        runner.logger.info(f"per class:\n{table}")


if __name__ == "__main__":
    run_command(main)
