"""Mask R-CNN with ShuffleMamba-L of 48 layers in a ViT-adapter and FPN, 12 epochs on COCO."""

_base_ = "./mask-rcnn_shufflemamba-base_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        backbone=dict(arch="large48", drop_path_rate=0.5),
        interaction_indexes=((0, 11), (12, 23), (24, 35), (36, 47)),
        num_heads=16,
    ),
    neck=dict(in_channels=[1024, 1024, 1024, 1024]),
)
