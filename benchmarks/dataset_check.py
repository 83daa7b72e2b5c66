"""Times the check of a COCO file of COCO's size, without pictures: ``python -m benchmarks.dataset_check``.

The file is made up: 118,287 images and 860,001 annotations as train2017 has, one annotation in a hundred a crowd, and
polygons of a length that gives a file of about the same size.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from mmvmamba.datasets.checks import Report, category_names, check_coco

WIDTH, HEIGHT = 640, 480


def write_document(path: Path, images: int, annotations: int, numbers: int) -> None:
    """Write a COCO file without a fault; polygons are zigzags of ``numbers`` numbers."""
    polygon = [round(20 + (k * 37 % 400) + k / 7, 2) for k in range(numbers)]
    crowd = {"size": [HEIGHT, WIDTH], "counts": [100, 50] * 1024 + [HEIGHT * WIDTH - 150 * 1024]}
    with path.open("w") as file:
        file.write('{"info": {}, "images": [')
        for k in range(images):
            entry = {"id": k, "file_name": f"{k:012d}.jpg", "height": HEIGHT, "width": WIDTH, "license": 1}
            file.write((", " if k else "") + json.dumps(entry))
        file.write('], "annotations": [')
        for k in range(annotations):
            is_crowd = k % 100 == 0
            entry = {"id": k + 1, "image_id": k % images, "category_id": k % 80 + 1, "iscrowd": int(is_crowd)}
            entry |= {"bbox": [20.5, 20.25, 400.0, 400.0], "area": 702.1057499999998}
            entry |= {"segmentation": crowd if is_crowd else [polygon]}
            file.write((", " if k else "") + json.dumps(entry))
        categories = [{"id": k + 1, "name": f"class {k}"} for k in range(80)]
        file.write('], "categories": ' + json.dumps(categories) + "}")


def main() -> None:
    """Make the file, check it and print the times, of the processor: one thread does it all."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--annotations", type=int, default=860_001)
    parser.add_argument("--numbers", type=int, default=46, help="numbers in each polygon (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.json"
        write_document(path, args.images, args.annotations, args.numbers)
        print(f"{args.images} images, {args.annotations} annotations, {path.stat().st_size / 1e6:.0f} MB")
        start = time.process_time()
        names = category_names(path, Report())
        print(f"categories alone ({len(names)}): {time.process_time() - start:.2f} s")
        start = time.process_time()
        report = Report()
        check_coco(path, report)
        seconds = time.process_time() - start
        print(f"all of the file: {seconds:.1f} s, errors: {report.errors}, warnings: {report.warnings}")
        start = time.process_time()
        with path.open() as file:
            json.load(file)
        print(f"json.load alone, as MMDetection reads it: {time.process_time() - start:.1f} s")
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
