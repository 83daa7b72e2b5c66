"""One pass over annotations and pictures before a training, with all problems in one report."""

from mmvmamba.datasets.checks.annotations import CocoUse
from mmvmamba.datasets.checks.classes import category_names, check_class_list, check_heads, compare_classes
from mmvmamba.datasets.checks.coco import CocoFile, check_coco
from mmvmamba.datasets.checks.folders import (
    FolderCheck,
    PictureOptions,
    check_class_folders,
    check_coco_pictures,
    check_label_pictures,
    class_folders,
)
from mmvmamba.datasets.checks.kept import (
    MAX_SKIPPED,
    Kept,
    Plan,
    plan_coco,
    plan_names,
    refuse_what_cannot_be_left_out,
)
from mmvmamba.datasets.checks.kinds import KINDS, Kind, Level, Part
from mmvmamba.datasets.checks.pictures import MAX_PIXELS, LabelRule, look_at_labels, look_at_picture
from mmvmamba.datasets.checks.report import Report

__all__ = [
    "KINDS",
    "MAX_PIXELS",
    "MAX_SKIPPED",
    "CocoFile",
    "CocoUse",
    "FolderCheck",
    "Kept",
    "Kind",
    "LabelRule",
    "Level",
    "Part",
    "PictureOptions",
    "Plan",
    "Report",
    "category_names",
    "check_class_folders",
    "check_class_list",
    "check_coco",
    "check_coco_pictures",
    "check_heads",
    "check_label_pictures",
    "class_folders",
    "compare_classes",
    "look_at_labels",
    "look_at_picture",
    "plan_coco",
    "plan_names",
    "refuse_what_cannot_be_left_out",
]
