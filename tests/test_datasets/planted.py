"""A small sound COCO data set, and a catalogue of defects to plant into it, each with the kind that must be found."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

WIDTH, HEIGHT = 48, 32
NAMES = ("cat", "dog", "fire hydrant", "Zebra")
NAN, INFINITY = float("nan"), float("inf")


def compressed(mask):
    """A mask (h, w) as COCO's compressed run lengths."""
    rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def sound(images=6):
    """A COCO document without a fault: polygons, both kinds of run lengths, a crowd, an image without annotation."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[4:14, 6:20] = 1
    square = [6, 4, 20, 4, 20, 14, 6, 14]
    runs = [6 * HEIGHT + 4, *[10, 22] * 13, 10, 28 * HEIGHT + 18]
    shapes = [([square], 0), (compressed(mask), 0), ({"size": [HEIGHT, WIDTH], "counts": runs}, 1)]
    document = {
        "info": {"description": "planted"},
        "images": [{"id": k + 1, "file_name": f"{k:03d}.jpg", "height": HEIGHT, "width": WIDTH} for k in range(images)],
        "annotations": [],
        "categories": [{"id": 3 * k + 1, "name": name, "supercategory": "x"} for k, name in enumerate(NAMES)],
    }
    for image in document["images"][:-1]:
        for shape, crowd in shapes:
            number = len(document["annotations"]) + 1
            document["annotations"].append(
                {
                    "id": number, "image_id": image["id"], "category_id": 3 * (number % 4) + 1, "iscrowd": crowd,
                    "bbox": [6, 4, 14, 10], "area": 140, "segmentation": copy.deepcopy(shape),
                }
            )  # fmt: skip
    return document


def write_data(folder, document):
    """Write a document and its pictures; (annotation file, folder of pictures)."""
    pictures = Path(folder) / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for image in document["images"]:
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(pictures / image["file_name"])
    path = Path(folder) / "planted.json"
    path.write_text(json.dumps(document))
    return path, pictures


def _set(part, index, **values):
    def plant(document):
        document[part][index].update(values)

    return plant


def _drop(part, index, key):
    def plant(document):
        del document[part][index][key]

    return plant


def _shape(value, index=0):
    return _set("annotations", index, segmentation=value)


def _runs(counts, size=(HEIGHT, WIDTH)):
    return _shape({"size": list(size), "counts": counts})


def _append(part, value):
    def plant(document):
        document[part].append(value)

    return plant


def _corners(document):
    for annotation in document["annotations"]:
        annotation["bbox"] = [20, 14, 44, 30]


AREA = WIDTH * HEIGHT
FULL = compressed(np.ones((HEIGHT, WIDTH)))["counts"]
#: (what is planted, how, the kind that is found)
DEFECTS = [
    ("images gone", lambda d: d.pop("images"), "json-structure"),
    ("images no list", lambda d: d.update(images={}), "json-structure"),
    ("no image", lambda d: d.update(images=[]), "json-structure"),
    ("annotations null", lambda d: d.update(annotations=None), "json-structure"),
    ("categories gone", lambda d: d.pop("categories"), "json-structure"),
    ("category a name only", lambda d: d.update(categories=list(NAMES)), "category-entry"),
    ("category without name", _drop("categories", 1, "name"), "category-entry"),
    ("category id a text", _set("categories", 1, id="4"), "category-entry"),
    ("category id twice", _set("categories", 1, id=1), "category-repeated"),
    ("category name twice", _set("categories", 1, name="cat"), "category-repeated"),
    ("image without height", _drop("images", 0, "height"), "image-entry"),
    ("image width 0", _set("images", 0, width=0), "image-entry"),
    ("image width a text", _set("images", 0, width="48"), "image-entry"),
    ("image width huge", _set("images", 0, width=1 << 40), "image-entry"),
    ("image without id", _drop("images", 0, "id"), "image-entry"),
    ("image id true", _set("images", 0, id=True), "image-entry"),
    ("image without file name", _drop("images", 0, "file_name"), "image-entry"),
    ("image no object", _append("images", 7), "image-entry"),
    ("image id twice", _set("images", 1, id=1), "image-id-repeated"),
    ("image named twice", _set("images", 1, file_name="000.jpg"), "image-named-twice"),
    ("image above the folder", _set("images", 0, file_name="../000.jpg"), "image-path"),
    ("image above it by a detour", _set("images", 0, file_name="a/../../000.jpg"), "image-path"),
    ("image absolute", _set("images", 0, file_name="/etc/passwd"), "image-path"),
    ("image with zero byte", _set("images", 0, file_name="0\x0000.jpg"), "image-path"),
    ("image missing", _set("images", 0, file_name="none.jpg"), "image-missing"),
    ("image name too long", _set("images", 0, file_name="x" * 5000), "image-missing"),
    ("image name half a character", _set("images", 0, file_name="\ud800.jpg"), "image-missing"),
    ("image name of Windows", _set("images", 0, file_name="pictures\\000.jpg"), "image-missing"),
    ("image of another size", _set("images", 0, width=WIDTH + 1), "image-size"),
    ("height and width swapped", _set("images", 5, width=HEIGHT, height=WIDTH), "image-size"),
    ("annotation no object", _append("annotations", []), "annotation-entry"),
    ("annotation without id", _drop("annotations", 0, "id"), "annotation-entry"),
    ("annotation without image", _drop("annotations", 0, "image_id"), "annotation-entry"),
    ("annotation without category", _drop("annotations", 0, "category_id"), "annotation-entry"),
    ("annotation without box", _drop("annotations", 0, "bbox"), "annotation-entry"),
    ("annotation without area", _drop("annotations", 0, "area"), "annotation-entry"),
    ("annotation id twice", _set("annotations", 1, id=1), "annotation-id-repeated"),
    ("annotation id 0", _set("annotations", 0, id=0), "annotation-id-zero"),
    ("annotation of no image", _set("annotations", 0, image_id=99), "annotation-no-image"),
    ("annotation of no category", _set("annotations", 0, category_id=2), "annotation-no-category"),
    ("box of 3 numbers", _set("annotations", 0, bbox=[1, 2, 3]), "box-shape"),
    ("box of texts", _set("annotations", 0, bbox=["1", "2", "3", "4"]), "box-shape"),
    ("box of true", _set("annotations", 0, bbox=[1, 2, True, 4]), "box-shape"),
    ("box NaN", _set("annotations", 0, bbox=[1, NAN, 3, 4]), "box-not-finite"),
    ("box infinite", _set("annotations", 0, bbox=[1, 2, INFINITY, 4]), "box-not-finite"),
    ("box beyond float", _set("annotations", 0, bbox=[1, 2, 10**400, 4]), "box-not-finite"),
    ("box negative", _set("annotations", 0, bbox=[20, 14, -14, -10]), "box-negative"),
    ("box of negative width", _set("annotations", 0, bbox=[20, 4, -14, 10]), "box-negative"),
    ("box of negative height", _set("annotations", 0, bbox=[6, 14, 14, -10]), "box-negative"),
    ("box empty", _set("annotations", 0, bbox=[6, 4, 0, 10]), "box-tiny"),
    ("box off the image", _set("annotations", 0, bbox=[100, 4, 14, 10]), "box-off-image"),
    ("box off to the left", _set("annotations", 0, bbox=[-20, 4, 14, 10]), "box-off-image"),
    ("box below the image", _set("annotations", 0, bbox=[6, 32, 14, 10]), "box-off-image"),
    ("box above the image", _set("annotations", 0, bbox=[6, -20, 14, 10]), "box-off-image"),
    ("box half outside", _set("annotations", 0, bbox=[40, 4, 14, 10]), "box-outside"),
    ("boxes as corners", _corners, "box-corners"),
    ("area NaN", _set("annotations", 0, area=NAN), "area-invalid"),
    ("area negative", _set("annotations", 0, area=-5), "area-invalid"),
    ("area 0", _set("annotations", 0, area=0), "area-zero"),
    ("area a text", _set("annotations", 0, area="140"), "annotation-entry"),
    ("crowd missing", _drop("annotations", 0, "iscrowd"), "crowd-missing"),
    ("crowd 2", _set("annotations", 0, iscrowd=2), "crowd-invalid"),
    ("crowd a text", _set("annotations", 0, iscrowd="0"), "crowd-invalid"),
    ("crowd with polygons", _set("annotations", 0, iscrowd=1), "crowd-polygon"),
    ("mask missing", _drop("annotations", 0, "segmentation"), "mask-missing"),
    ("mask empty", _shape([]), "mask-missing"),
    ("mask a text", _shape("x"), "mask-type"),
    ("mask a number", _shape(3), "mask-type"),
    ("polygon not in a list", _shape([6, 4, 20, 4, 20, 14]), "polygon-type"),
    ("polygon of texts", _shape([["6", "4", "20", "4", "20", "14"]]), "polygon-type"),
    ("polygon of pairs", _shape([[[6, 4], [20, 4], [20, 14]]]), "polygon-type"),
    ("polygon odd", _shape([[6, 4, 20, 4, 20, 14, 6]]), "polygon-odd"),
    ("polygon of 2 points", _shape([[6, 4, 20, 4]]), "polygon-short"),
    ("second polygon short", _shape([[6, 4, 20, 4, 20, 14], [1, 2]]), "polygon-short"),
    ("polygon short after one outside", _shape([[6, 4, 60, 4, 20, 14], [1, 2]]), "polygon-short"),
    ("polygon empty", _shape([[]]), "polygon-short"),
    ("polygon NaN first", _shape([[NAN, 4, 20, 4, 20, 14]]), "polygon-not-finite"),
    ("polygon NaN inside", _shape([[6, 4, 20, NAN, 20, 14]]), "polygon-not-finite"),
    ("polygon beyond float", _shape([[6, 4, 10**400, 4, 20, 14]]), "polygon-not-finite"),
    ("polygon far outside", _shape([[6, 4, 20, 4, 20, 100000]]), "polygon-far-outside"),
    ("polygon far above", _shape([[6, -100000, 20, 4, 20, 14]]), "polygon-far-outside"),
    ("polygon far to the left", _shape([[-100000, 4, 20, 4, 20, 14]]), "polygon-far-outside"),
    ("polygon far to the right", _shape([[6, 4, 100000, 4, 20, 14]]), "polygon-far-outside"),
    ("polygon outside", _shape([[6, 4, 60, 4, 20, 14]]), "polygon-outside"),
    ("run lengths without size", _shape({"counts": [AREA]}), "rle-size"),
    ("size swapped", _runs([AREA], (WIDTH, HEIGHT)), "rle-size"),
    ("size a text", _shape({"size": "x", "counts": [AREA]}), "rle-size"),
    ("runs too long", _runs([10, AREA]), "rle-sum"),
    ("runs too short", _runs([10, 20]), "rle-sum"),
    ("runs empty", _runs([]), "rle-sum"),
    ("runs negative", _runs([AREA + 10, -10]), "rle-counts"),
    ("runs of fractions", _runs([10.5, AREA - 10.5]), "rle-counts"),
    ("runs missing", _shape({"size": [HEIGHT, WIDTH]}), "rle-counts"),
    ("compressed too long", _runs(FULL + "1"), "rle-sum"),
    ("compressed beyond the image", _runs("oooooooooooooooooooooooooooo1"), "rle-counts"),
    ("compressed cut within a number", _runs(FULL[:-1]), "rle-counts"),
    ("compressed with a space", _runs(FULL + " "), "rle-counts"),
    ("compressed negative", _runs("A"), "rle-counts"),
]
