"""Mask R-CNN with VMamba-T [s1l8] on your own data in COCO's format: copy this file, change "your data", train.

docs/own_data.md goes through it. It starts from the official ImageNet weights; with ``load_from`` from a detector,
whose last layers begin anew because they know other classes.
"""

_base_ = "../vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"

# ---- your data
# The names of the categories, in the order of the annotation files; a single one needs a comma: ("cat",)
classes = ("first class", "second class")
data_root = "data/own/"
train_annotations, train_images = "annotations/train.json", "images/train/"
val_annotations, val_images = "annotations/val.json", "images/val/"
# ---- everything below follows

num_classes = len(classes)
metainfo = dict(classes=classes)
model = dict(roi_head=dict(bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes)))

train_dataset = dict(
    metainfo=metainfo, data_root=data_root, ann_file=train_annotations, data_prefix=dict(img=train_images)
)
val_dataset = dict(metainfo=metainfo, data_root=data_root, ann_file=val_annotations, data_prefix=dict(img=val_images))
train_dataloader = dict(dataset=train_dataset)
val_dataloader = dict(dataset=val_dataset)
test_dataloader = dict(dataset=val_dataset)
val_evaluator = dict(ann_file=data_root + val_annotations)
test_evaluator = dict(ann_file=data_root + val_annotations)

# COCO's warm-up of 1000 iterations is longer than a whole training on a small data set: one epoch here.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

# The usual 50 iterations may be more than an epoch here, and nothing would be logged.
default_hooks = dict(logger=dict(interval=10))

custom_hooks = [
    dict(type="mmvmamba.PretrainedCheckHook"),
    # Only load_from asks this list, and only where a layer does not fit.
    dict(
        type="mmvmamba.CheckpointCheckHook",
        allow_missing=["roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits"],
    ),
]
