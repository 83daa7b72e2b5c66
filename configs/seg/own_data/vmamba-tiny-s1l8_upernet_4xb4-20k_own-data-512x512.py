"""UperNet with VMamba-T [s1l8] on your own label pictures: copy this file, change "your data", train.

docs/own_data.md goes through it. It starts from the official ImageNet weights; with ``load_from`` from a segmentor,
whose last layers begin anew because they know other classes.
"""

_base_ = "../vmamba/vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py"

# ---- your data
# The names of the labels 0, 1, 2 ...; 255 is "not labelled". A single one needs a comma: ("road",)
classes = ("first class", "second class")
# True if 0 is "not labelled" and the classes begin at 1, as in ADE20K.
reduce_zero_label = False
data_root = "data/own/"
train_images, train_labels = "images/train", "labels/train"
val_images, val_labels = "images/val", "labels/val"
image_ending, label_ending = ".jpg", ".png"
max_iters = 20000  # at least 2
# ---- everything below follows

tenth, warm_up = max(1, max_iters // 10), max(1, max_iters // 20)
num_classes = len(classes)
model = dict(decode_head=dict(num_classes=num_classes), auxiliary_head=dict(num_classes=num_classes))

crop_size = (512, 512)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after resizing: labels are compared at the picture's own size
    dict(type="PackSegInputs"),
]
dataset = dict(
    _delete_=True,
    type="BaseSegDataset",
    metainfo=dict(classes=classes),
    reduce_zero_label=reduce_zero_label,
    data_root=data_root,
    img_suffix=image_ending,
    seg_map_suffix=label_ending,
)
train_dataset = dict(
    data_prefix=dict(img_path=train_images, seg_map_path=train_labels), pipeline=train_pipeline, **dataset
)
val_dataset = dict(data_prefix=dict(img_path=val_images, seg_map_path=val_labels), pipeline=test_pipeline, **dataset)
train_dataloader = dict(dataset=train_dataset)
val_dataloader = dict(dataset=val_dataset)
test_dataloader = dict(dataset=val_dataset)

train_cfg = dict(max_iters=max_iters, val_interval=tenth)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=warm_up),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=warm_up, end=max_iters),
]
default_hooks = dict(checkpoint=dict(interval=tenth), logger=dict(interval=10))

custom_hooks = [
    dict(type="mmvmamba.PretrainedCheckHook"),
    # Only load_from asks this list, and only where a layer does not fit.
    dict(type="mmvmamba.CheckpointCheckHook", allow_missing=["decode_head.conv_seg", "auxiliary_head.conv_seg"]),
]
