"""What a check of a data set can find: the names, how bad each is, what it means and its cure.

docs/data.md has the same table; tests/test_datasets/test_checks_report.py keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How bad a finding is: an error must be repaired or left out, a warning is something to look at."""

    ERROR = "error"
    WARNING = "warning"


class Part(str, Enum):
    """What a training can leave out to be rid of a finding."""

    ANNOTATION = "annotation"
    IMAGE = "image"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Attributes:
        level: Error or warning.
        part: What the policy ``skip`` leaves out because of it.
        meaning: What it is and what it does to a training.
        cure: One thing to do.
    """

    level: Level
    part: Part
    meaning: str
    cure: str


def _error(part: Part, meaning: str, cure: str) -> Kind:
    return Kind(Level.ERROR, part, meaning, cure)


def _warning(meaning: str, cure: str) -> Kind:
    return Kind(Level.WARNING, Part.NOTHING, meaning, cure)


_OLD_PYCOCOTOOLS = "pycocotools before 2.0.5 writes outside its memory there"

_FILE = {
    "file-missing": _error(Part.NOTHING, "a file or folder is not there, or may not be read", "Correct the path."),
    "json-invalid": _error(
        Part.NOTHING, "the annotation file is no JSON text: cut off, empty, or of another format", "Get it again."
    ),
    "json-repeated-key": _error(
        Part.NOTHING, "an object has one name twice; readers keep the last and lose the rest", "Merge the two."
    ),
    "json-structure": _error(
        Part.NOTHING,
        "a part that COCO's format asks for is missing or of another type",
        "Write it as docs/data.md says.",
    ),
    "folder-empty": _error(
        Part.NOTHING, "no picture is in the folder", "Correct the folder or the suffix of the config."
    ),
    "folder-other-files": _warning(
        "pictures with another suffix than the config's are in the folder; they are not used",
        "Rename or move them, or correct the suffix of the config.",
    ),
}

_CATEGORIES = {
    "category-entry": _error(
        Part.NOTHING, "a category has no whole number as id or no text as name", "Write id and name of each category."
    ),
    "category-repeated": _error(
        Part.NOTHING,
        "two categories have one id or one name; their labels cannot be told apart",
        "Merge or rename them.",
    ),
    "category-unused": _warning(
        "a class of the config has no annotation", "Check the name; such a class is not learnt."
    ),
    "classes-not-a-list": _error(
        Part.NOTHING,
        "classes in the config is a single text, which is taken letter by letter or as a file name",
        "Write a comma: classes=('name',).",
    ),
    "classes-entry": _error(
        Part.NOTHING,
        "classes in the config is empty, or has a name twice or something that is no text",
        "Correct the list.",
    ),
    "classes-not-in-file": _error(
        Part.NOTHING,
        "a class of the config is no category of the file; all later labels shift without a word",
        "Copy the names of the file into metainfo.classes, in its order.",
    ),
    "classes-order": _error(
        Part.NOTHING,
        "the classes of the config are in another order than the file's; labels follow the file, names the config",
        "Write metainfo.classes in the order of the file.",
    ),
    "classes-left-out": _warning(
        "categories of the file are not in the config's classes; their annotations are not used",
        "Add them to metainfo.classes if they are meant to be learnt.",
    ),
    "classes-differ": _error(
        Part.NOTHING, "training and validation do not have the same classes in the same order", "Use one list for all."
    ),
    "class-folders": _error(
        Part.NOTHING,
        "there are not as many folders as classes in the config; MMPretrain stops at that",
        "Correct data_prefix or metainfo.classes; CustomDataset takes any folders.",
    ),
    "num-classes": _error(
        Part.NOTHING,
        "a head of the model has another number of classes than the data set",
        "Set num_classes of the head.",
    ),
}

_IMAGES = {
    "image-entry": _error(
        Part.IMAGE,
        "an entry of images lacks id, file_name, height or width, or has another type",
        "Complete the entry.",
    ),
    "image-id-repeated": _error(Part.IMAGE, "two images have one id", "Give each image its own id."),
    "image-path": _error(
        Part.IMAGE,
        "a file name is absolute, leaves the folder, or holds a zero byte",
        "Name the file within its folder.",
    ),
    "image-named-twice": _warning("two images have one file name", "Remove one of the two if it is a mistake."),
    "image-missing": _error(Part.IMAGE, "the file of an image is not there, or may not be read", "Get or remove it."),
    "image-empty": _error(Part.IMAGE, "the file of an image has no bytes", "Get it again."),
    "image-unreadable": _error(Part.IMAGE, "a file is no picture that can be decoded", "Get it again or convert it."),
    "image-cut": _error(
        Part.IMAGE,
        "a picture is cut off or damaged; OpenCV may fill the rest with grey and say nothing",
        "Get it again.",
    ),
    "image-too-large": _error(
        Part.IMAGE, "a picture has more pixels than the limit; it was not decoded", "Cut it, or raise --max-pixels."
    ),
    "image-size": _error(
        Part.IMAGE,
        "a picture has another size than its entry says, as MMDetection sees it",
        "Correct height and width.",
    ),
    "image-turned": _warning(
        "a picture says in its EXIF data that it is to be turned, and OpenCV does so",
        "See that the annotations are for the turned picture; better store it turned.",
    ),
    "image-cmyk": _warning("a picture has printing colours (CMYK); its colours may be wrong", "Convert it to RGB."),
    "image-16-bit": _warning(
        "a picture has more than 8 bits per channel; the lower ones are lost", "Convert it to 8 bits."
    ),
    "image-animated": _warning(
        "a picture has several frames; only the first is used", "Store the frame that is meant."
    ),
}

_ANNOTATIONS = {
    "annotation-entry": _error(
        Part.ANNOTATION,
        "an annotation lacks id, image_id, category_id, bbox or area, or has another type",
        "Complete the annotation.",
    ),
    "annotation-id-repeated": _error(
        Part.ANNOTATION, "two annotations have one id; MMDetection stops at that", "Number the annotations anew."
    ),
    "annotation-id-zero": _warning(
        "an annotation has the id 0, which the COCO evaluation counts as not found", "Number from 1."
    ),
    "annotation-no-image": _error(
        Part.ANNOTATION, "image_id is no image of the file", "Correct or remove the annotation."
    ),
    "annotation-no-category": _error(
        Part.ANNOTATION, "category_id is no category of the file", "Correct or remove the annotation."
    ),
    "box-shape": _error(Part.ANNOTATION, "a box is not four numbers [x, y, width, height]", "Write four numbers."),
    "box-not-finite": _error(Part.ANNOTATION, "a box holds NaN, infinity or a senseless number", "Correct the box."),
    "box-negative": _error(
        Part.ANNOTATION, "a box has a negative width or height", "Write [x, y, width, height], not two corners."
    ),
    "box-tiny": _warning("a box is less than one pixel wide or high; MMDetection leaves it out", "Remove it."),
    "box-off-image": _error(
        Part.ANNOTATION, "a box lies wholly outside its image; MMDetection leaves it out", "Correct or remove it."
    ),
    "box-outside": _warning("a box reaches out of its image; MMDetection cuts it", "Check for a mixed-up image."),
    "box-corners": _warning(
        "many boxes reach out of their image, but would fit if they were two corners [x1, y1, x2, y2]",
        "Write [x, y, width, height].",
    ),
    "area-invalid": _error(
        Part.ANNOTATION, "area is negative, NaN or infinite", "Write the area of the mask in pixels."
    ),
    "area-zero": _warning("area is 0; MMDetection leaves the annotation out", "Write the area of the mask in pixels."),
    "crowd-missing": _error(
        Part.ANNOTATION, "an annotation has no iscrowd, at which the COCO evaluation stops", "Write iscrowd: 0."
    ),
    "crowd-invalid": _error(Part.ANNOTATION, "iscrowd is neither 0 nor 1", "Write 0 or 1."),
    "crowd-polygon": _warning("a crowd has polygons, where COCO has run lengths", "Check that it is a crowd."),
}

_SHAPES = {
    "mask-missing": _error(
        Part.ANNOTATION,
        "an annotation has no segmentation, which a model with masks needs",
        "Add it, or use --no-masks.",
    ),
    "mask-type": _error(
        Part.ANNOTATION, "segmentation is neither a list of polygons nor run lengths", "Write [[x1, y1, x2, y2, ...]]."
    ),
    "polygon-type": _error(Part.ANNOTATION, "a polygon is no list of numbers", "Write [[x1, y1, x2, y2, ...]]."),
    "polygon-odd": _error(Part.ANNOTATION, "a polygon has an odd count of numbers", "Write pairs of x and y."),
    "polygon-short": _error(
        Part.ANNOTATION,
        "a polygon has fewer than three points; four numbers are taken for a box",
        "Remove or complete it.",
    ),
    "polygon-not-finite": _error(
        Part.ANNOTATION, "a polygon holds NaN, infinity or a senseless number", "Correct the polygon."
    ),
    "polygon-far-outside": _error(
        Part.ANNOTATION,
        f"a polygon reaches further out of its image than the image is large; {_OLD_PYCOCOTOOLS}",
        "Correct the polygon.",
    ),
    "polygon-outside": _warning("a polygon reaches out of its image", "Check for a mixed-up image."),
    "rle-size": _error(
        Part.ANNOTATION, "the size of run lengths is not [height, width] of the image", "Write [height, width]."
    ),
    "rle-counts": _error(
        Part.ANNOTATION,
        "run lengths are no list of whole numbers of 0 or more, and no text of COCO's compressed form",
        "Encode the mask anew.",
    ),
    "rle-sum": _error(
        Part.ANNOTATION, f"run lengths do not add up to height * width; {_OLD_PYCOCOTOOLS}", "Encode the mask anew."
    ),
}

_LABELS = {
    "label-missing": _error(Part.IMAGE, "an image has no label picture", "Add it, or remove the image."),
    "label-unused": _warning("a label picture has no image", "Add the image, or correct the suffix of the config."),
    "label-unreadable": _error(Part.IMAGE, "a label picture cannot be decoded or is cut", "Get it again."),
    "label-size": _error(Part.IMAGE, "a label picture has another size than its image", "Make it anew in that size."),
    "label-colours": _error(
        Part.IMAGE,
        "a label picture has several channels; one number per pixel is needed",
        "Turn colours into class numbers.",
    ),
    "label-palette": _warning(
        "a label picture has a palette; Pillow (the default) reads its numbers, cv2 would read its colours",
        "Store it without a palette, or keep imdecode_backend='pillow'.",
    ),
    "label-range": _error(
        Part.IMAGE,
        "a label picture has a number that is no class; on a GPU this ends the process",
        "Correct the labels, num_classes or reduce_zero_label.",
    ),
}

_LISTS = {
    "list-line": _error(
        Part.IMAGE,
        "a line of a list of images cannot be used",
        "Write one file per line, for classification 'file number'.",
    ),
    "class-folder-empty": _warning("the folder of a class has no picture", "Add pictures or remove the folder."),
}

#: Every kind by its name.
KINDS: dict[str, Kind] = {**_FILE, **_CATEGORIES, **_IMAGES, **_ANNOTATIONS, **_SHAPES, **_LABELS, **_LISTS}
