"""Damages COCO files at random and has each checked: ``python fuzzed_coco.py FOLDER FIRST NUMBER``.

Run as a process of its own, so that a crash is seen as one. A file that the check passes must then be read by
MMDetection, and every mask of it decoded by pycocotools; one that it refuses must be passed after the policy skip has
left out what is bad, if it can be left out. The last line is the counts as JSON.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path

from mmvmamba.datasets.checks import KINDS, Level, Part, Report, check_coco, plan_coco

sys.path.insert(0, str(Path(__file__).parent))
from peak_memory import peak_kibibytes
from planted import FULL, HEIGHT, WIDTH, sound

NASTY = (
    None, True, False, 0, -1, 1, 2, 3, 31, 32, 48, 1e300, -0.0, 0.5, 1e9, 10**20, -(10**400), float("nan"),
    float("inf"), "", "x", "1", "0", "\ud800", "\0", "../..", "a" * 300, FULL, FULL[:-1], "PPPP", "o" * 40,
    [], [[]], [0], [1, 2, 3, 4], [[1, 2, 3, 4, 5, 6]], [[1e8] * 6], [[float("nan")] * 6], {}, {"counts": []},
    {"size": [HEIGHT, WIDTH], "counts": FULL}, {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH, 0, 0]},
    {"size": [1 << 20, 1 << 20], "counts": [1 << 40]},
)  # fmt: skip
#: Masks of larger images are not decoded here: that they are large is no fault.
DECODED_PIXELS = 1_000_000


def places(node, found):
    """Collect every (container, key) below a node."""
    keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        found.append((node, key))
        places(node[key], found)
    return found


def damage(document, rng):
    """Change one thing."""
    found = places(document, [])
    if not found:
        return
    container, key = rng.choice(found)
    what = rng.randrange(8)
    if what < 3:
        container[key] = copy.deepcopy(rng.choice(NASTY))
    elif what == 3:
        del container[key]
    elif what == 4:
        other, place = rng.choice(found)
        container[key] = copy.deepcopy(other[place])
    elif what == 5 and isinstance(container, list):
        container.insert(key, copy.deepcopy(rng.choice([container[key], *NASTY])))
    elif isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
        container[key] = rng.choice([-container[key], container[key] + 0.5, container[key] * 100, container[key] + 1])
    elif isinstance(container[key], str):
        text = list(container[key] or "x")
        text[rng.randrange(len(text))] = chr(rng.choice([rng.randrange(48, 112), rng.randrange(0x110000)]))
        container[key] = "".join(text)
    elif isinstance(container[key], list):
        rng.shuffle(container[key])


def damage_text(text, rng):
    """Cut, double or change bytes of the file itself."""
    content = bytearray(text.encode())
    place = rng.randrange(len(content))
    what = rng.randrange(4)
    if what == 0:
        del content[place:]
    elif what == 1:
        content[place] = rng.randrange(256)
    elif what == 2:
        content[place:place] = rng.choice([b"NaN", b"-Infinity", b"[", b"]", b"{", b'"', b",", b"1e999", b"\xff"])
    else:
        content[place:place] = content[place : place + rng.randrange(60)]
    return bytes(content)


def vary(document, rng):
    """Change what a sound file may have otherwise, too."""
    for part in ("images", "annotations"):
        rng.shuffle(document[part])
        for entry in document[part]:
            if rng.random() < 0.3:
                entry[f"extra{rng.randrange(9)}"] = copy.deepcopy(rng.choice([NASTY[k] for k in range(16)]))
    offset = rng.randrange(10**9)
    for annotation in document["annotations"]:
        annotation["id"] += offset
        if rng.random() < 0.5:
            left, top = rng.uniform(0, WIDTH - 9), rng.uniform(0, HEIGHT - 9)
            width, height = rng.uniform(1, WIDTH - left + 1), rng.uniform(1, HEIGHT - top + 1)
            annotation.update(bbox=[left, top, width, height], area=rng.choice([1, 0.01, width * height]))
        if rng.random() < 0.3 and not annotation["iscrowd"]:
            points = [rng.uniform(-1, side + 1) for _ in range(rng.randrange(3, 30)) for side in (WIDTH, HEIGHT)]
            annotation["segmentation"] = [points, points[:6]]
    if rng.random() < 0.2:
        document["annotations"].clear()


def read_by_others(path):
    """Read a file with MMDetection and decode its masks; whatever is raised is a fault of the check."""
    import numpy as np
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations
    from pycocotools import mask as mask_api
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    names = [category["name"] for category in coco.dataset.get("categories", [])]
    for annotation in coco.dataset.get("annotations", []):
        image = coco.imgs[annotation["image_id"]]
        shape, segmentation = (image["height"], image["width"]), annotation.get("segmentation")
        if shape[0] * shape[1] > DECODED_PIXELS or not segmentation:
            continue
        encoded = segmentation
        if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
            encoded = mask_api.frPyObjects(segmentation, *shape)
        decoded = mask_api.decode(encoded)
        if decoded.shape[:2] != shape or not np.isfinite(mask_api.area(encoded)).all():
            raise ValueError(f"{path}: a mask of {decoded.shape} in an image of {shape}")
    with contextlib.redirect_stdout(io.StringIO()):
        entries = {"ann_file": str(path), "data_prefix": {"img": ""}, "metainfo": {"classes": names}, "pipeline": []}
        dataset = CocoDataset(**entries, serialize_data=False)  # serializing collects garbage, which takes long
    load = LoadAnnotations(with_bbox=True, with_mask=True)
    for index in range(len(dataset)):
        entry = dataset.get_data_info(index)
        if entry["height"] * entry["width"] <= DECODED_PIXELS and all("mask" in each for each in entry["instances"]):
            load(
                {
                    **entry,
                    "img_shape": (entry["height"], entry["width"]),
                    "ori_shape": (entry["height"], entry["width"]),
                }
            )


def one(seed, folder):
    """Make, check and read one file; what became of it."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    document = sound(images=3)
    path = folder / "fuzzed.json"
    vary(document, rng)
    valid = seed % 5 == 0
    for _ in range(0 if valid else rng.choice([1, 1, 1, 2, 4])):
        damage(document, rng)
    text = json.dumps(document)
    path.write_bytes(damage_text(text, rng) if seed % 5 == 1 else text.encode())
    report = Report()
    coco = check_coco(path, report)
    report.text().encode()
    json.dumps(report.as_dict())
    if valid and report.errors:
        raise ValueError(f"seed {seed}: a sound file was refused\n{report.text()}")
    if not report.errors:
        read_by_others(path)
        return "passed, sound" if valid else "passed"
    if any(KINDS[kind].part is Part.NOTHING for kind in report.kinds() if KINDS[kind].level is Level.ERROR):
        return "refused as a whole"
    kept = folder / "kept.json"
    kept.unlink(missing_ok=True)
    if len(coco.bad_images) >= 2 or len(coco.bad_annotations) == len(coco.document["annotations"]):
        return "refused"
    try:
        plan_coco(coco, kept, max_skipped=1.0).write()
    except ValueError as error:  # nothing would be left
        if "would be left out" in str(error):
            return "refused"
        raise
    again = Report()
    check_coco(kept, again)
    if again.errors:
        raise ValueError(f"seed {seed}: what was kept has errors\n{again.text()}")
    read_by_others(kept)
    return "repaired"


def main():
    """Go over the seeds."""
    folder, first, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    counts = Counter()
    for seed in range(first, first + number):
        (folder / "seed").write_text(str(seed))  # what is left of a crash
        try:
            counts[one(seed, folder)] += 1
        except Exception:
            print(f"seed {seed}", file=sys.stderr)
            raise
    counts["memory in KiB"] = peak_kibibytes()
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
