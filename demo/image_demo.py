"""Show what a model sees: ``python demo/image_demo.py det MODEL INPUT... [--weights FILE]``.

``MODEL`` is a name of the model index, which brings its official weights, or a config file. ``INPUT`` is an image or a
folder of images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mmvmamba.analysis.predictions import pictures
from mmvmamba.apis import inferencer
from mmvmamba.errors import MMVMambaError

_SHOWN = 3


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["det", "seg", "cls"], help="detection, segmentation or classification")
    parser.add_argument("model", help="a name of the model index (see configs/README.md) or a config file")
    parser.add_argument("inputs", nargs="+", help="images and folders of images")
    parser.add_argument("--weights", help="a checkpoint file or an https URL (default: the official one of the model)")
    parser.add_argument("--device", help="such as cuda:0 or cpu (default: a GPU if there is one)")
    parser.add_argument("--out-dir", default="work_dirs/image_demo", help="for the results (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="images at once (default: %(default)s)")
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, help="objects below are not drawn (default: %(default)s)"
    )
    parser.add_argument("--no-draw", action="store_true", help="write predictions only")
    return parser.parse_args()


def main() -> int:
    """Answer for all inputs and return the exit code."""
    args = parse_args()
    try:
        pictures(args.inputs)  # a wrong path is said before a model is built and its weights are fetched
        ready = inferencer(args.task, args.model, args.weights, args.device)
        print(ready.weights)
        answers = ready.stream(
            args.inputs,
            batch_size=args.batch_size,
            draw=not args.no_draw,
            score_threshold=args.score_threshold,
            out_dir=args.out_dir,
        )
        for answer in answers:
            print(f"{answer.source}: {summary(answer.record, args.score_threshold)}", flush=True)
    except MMVMambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"predictions: {Path(args.out_dir) / 'preds'}")
    if not args.no_draw:
        print(f"drawings: {Path(args.out_dir) / 'vis'}")
    return 0


def summary(record: dict[str, Any], score_threshold: float) -> str:
    """Return a prediction's record in a few words."""
    if "instances" in record:
        seen = [entry["class"] for entry in record["instances"] if entry["score"] >= score_threshold]
        counts = sorted(((seen.count(name), name) for name in set(seen)), key=lambda pair: (-pair[0], pair[1]))
        return ", ".join(f"{count} x {name}" for count, name in counts) or f"nothing above {score_threshold}"
    classes = record["classes"][:_SHOWN]
    if "score" in classes[0]:
        return ", ".join(f"{entry['class']} {entry['score']:.3f}" for entry in classes)
    pixels = record["height"] * record["width"]
    return ", ".join(f"{entry['class']} {entry['pixels'] / pixels:.1%}" for entry in classes)


if __name__ == "__main__":
    sys.exit(main())
