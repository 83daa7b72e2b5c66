"""Train a detector, segmentor or classifier: ``python tools/train.py CONFIG``."""

from __future__ import annotations

import argparse
import os

from mmvmamba.apis import (
    add_shared_arguments,
    build_runner,
    check_data,
    load_config,
    prepare_training,
    run_command,
    train,
)


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="config file of MMDetection, MMSegmentation or MMPretrain style")
    parser.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config name>)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from this checkpoint, or without a value from the newest complete one in the work dir; "
        "'auto-or-start' starts from the beginning if there is none",
    )
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="train in mixed precision, or with --no-amp in float32 (default: as the config says)",
    )
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    add_shared_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Train."""
    args = parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = load_config(args.config, work_dir=args.work_dir, cfg_options=args.cfg_options, launcher=args.launcher)
    notes = prepare_training(cfg, amp=args.amp, auto_scale_lr=args.auto_scale_lr, resume=args.resume)
    warnings = check_data(cfg, ["train", "val"])
    runner = build_runner(cfg)
    for note in notes:
        runner.logger.log(note.level, note.text)
    for text in warnings:
        runner.logger.warning(text)
    train(runner)


if __name__ == "__main__":
    run_command(main)
