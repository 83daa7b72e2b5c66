"""The annotations of a COCO file, one by one: ids, boxes, areas, crowds, and through ``shapes`` the masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mmvmamba.datasets.checks.kinds import KINDS, Part
from mmvmamba.datasets.checks.report import Report, short
from mmvmamba.datasets.checks.shapes import LIMIT, ROUNDING, Problem, check_segmentation, is_number, is_sensible

#: From this share of the boxes on, boxes that reach out of their image are taken for two corners.
_CORNERS_SHARE, _CORNERS_LEAST = 0.2, 5


@dataclass(frozen=True)
class CocoUse:
    """What a file is for, which decides what it must hold.

    Attributes:
        masks: Whether a model with masks reads it; None: if any annotation has a mask, all must.
        evaluation: Whether COCO's evaluation reads it.
        annotations: Whether it must have annotations, which files of test images have not.
    """

    masks: bool | None = None
    evaluation: bool = True
    annotations: bool = True


@dataclass
class AnnotationCheck:
    """Goes over annotations and remembers those that have an error.

    Args:
        file: Name of the file, for the report.
        images: Image id -> its name, and its height and width or None where these are unusable.
        categories: The ids of the categories.
        use: What the file is for.
        report: Where the findings go.
    """

    file: str
    images: dict[int, tuple[str, int | None, int | None]]
    categories: set[int]
    use: CocoUse
    report: Report
    bad: set[int] = field(default_factory=set)
    per_category: Counter[int] = field(default_factory=Counter)
    _ids: set[int] = field(default_factory=set)
    _outside: int = 0
    _corners: int = 0

    def run(self, annotations: list[Any]) -> None:
        """Check all of them; ``bad`` then holds the places in the list of those with an error."""
        masks = self.use.masks
        if masks is None:
            masks = any(isinstance(each, dict) and each.get("segmentation") for each in annotations)
        for index, annotation in enumerate(annotations):
            if type(annotation) is dict:
                problems = self._problems(annotation, masks)
            else:
                problems = iter([("annotation-entry", f"it is {short(annotation)}, expected an object")])
            for kind, text in problems:
                self.report.add(kind, self.file, self._place(index, annotation), text)
                if KINDS[kind].part is Part.ANNOTATION:
                    self.bad.add(index)
        if self._outside > _CORNERS_LEAST and self._corners > _CORNERS_SHARE * len(annotations):
            outside = f"{self._outside} of {len(annotations)} boxes reach out of their image"
            text = f"{outside}, {self._corners} would fit as corners"
            self.report.add("box-corners", self.file, "annotations", text)

    def _place(self, index: int, annotation: Any) -> str:
        if type(annotation) is not dict:
            return f"annotations[{index}]"
        image = annotation.get("image_id")
        known = self.images.get(image) if type(image) is int else None
        name = f", {known[0]}" if known else ""
        return f"annotations[{index}] (id {short(annotation.get('id'))}, image {short(image)}{name})"

    def _problems(self, annotation: dict[str, Any], masks: bool) -> Iterator[Problem]:
        yield from self._check_id(annotation)
        image = annotation.get("image_id")
        height = width = None
        if type(image) is not int:
            yield "annotation-entry", f"image_id is {short(image)}, expected a whole number"
        elif image not in self.images:
            yield "annotation-no-image", f"image_id is {short(image)}, expected an id of images"
        else:
            _, height, width = self.images[image]
        category = annotation.get("category_id")
        if type(category) is not int:
            yield "annotation-entry", f"category_id is {short(category)}, expected a whole number"
        elif category not in self.categories:
            yield "annotation-no-category", f"category_id is {short(category)}, expected an id of categories"
        else:
            self.per_category[category] += 1
        yield from self._check_box(annotation.get("bbox"), height, width)
        yield from _check_area(annotation)
        yield from self._check_crowd(annotation)
        segmentation = annotation.get("segmentation")
        if segmentation not in (None, []):
            yield from check_segmentation(segmentation, height, width)
        elif masks:
            yield "mask-missing", f"segmentation is {short(segmentation)}, expected polygons or run lengths"

    def _check_id(self, annotation: dict[str, Any]) -> Iterator[Problem]:
        own = annotation.get("id")
        if type(own) is not int:
            yield "annotation-entry", f"id is {short(own)}, expected a whole number"
            return
        if own in self._ids:
            yield "annotation-id-repeated", "another annotation has the same id"
        elif own == 0:
            yield "annotation-id-zero", "id is 0, expected 1 or more"
        self._ids.add(own)

    def _check_box(self, box: Any, height: int | None, width: int | None) -> Iterator[Problem]:
        if box is None:
            yield "annotation-entry", "bbox is missing, expected [x, y, width, height]"
            return
        if type(box) is not list or len(box) != 4 or not all(map(is_number, box)):
            yield "box-shape", f"bbox is {short(box)}, expected [x, y, width, height]"
            return
        if not all(map(is_sensible, box)):
            yield "box-not-finite", f"bbox is {short(box)}, expected places within the image"
            return
        x, y, w, h = box
        if w < 0 or h < 0:
            yield "box-negative", f"bbox is {short(box)}, expected a width and height of 1 or more"
            return
        if w < 1 or h < 1:
            yield "box-tiny", f"bbox is {short(box)}, expected a width and height of 1 or more"
            return
        if height is None or width is None:
            return
        if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
            yield "box-off-image", f"bbox is {short(box)}, the image is {width} x {height}"
        elif x < -ROUNDING or y < -ROUNDING or x + w > width + ROUNDING or y + h > height + ROUNDING:
            self._outside += 1
            self._corners += x < w <= width + ROUNDING and y < h <= height + ROUNDING
            yield "box-outside", f"bbox is {short(box)}, the image is {width} x {height}"

    def _check_crowd(self, annotation: dict[str, Any]) -> Iterator[Problem]:
        crowd = annotation.get("iscrowd")
        if crowd is None:
            if self.use.evaluation:
                yield "crowd-missing", "iscrowd is missing, expected 0 or 1"
        elif type(crowd) not in (int, bool) or crowd not in (0, 1):
            yield "crowd-invalid", f"iscrowd is {short(crowd)}, expected 0 or 1"
        elif crowd and isinstance(annotation.get("segmentation"), list):
            yield "crowd-polygon", "iscrowd is 1, expected run lengths in segmentation"


def _check_area(annotation: dict[str, Any]) -> Iterator[Problem]:
    area: Any = annotation.get("area")
    if not is_number(area):
        yield "annotation-entry", f"area is {short(area)}, expected a number"
    elif not 0 <= area < LIMIT:
        yield "area-invalid", f"area is {short(area)}, expected the pixels of the mask"
    elif area == 0:
        yield "area-zero", "area is 0, expected the pixels of the mask"
