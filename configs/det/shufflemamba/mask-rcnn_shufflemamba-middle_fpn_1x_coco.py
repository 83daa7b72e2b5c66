"""Mask R-CNN with ShuffleMamba-M in a ViT-adapter and FPN, 12 epochs on COCO."""

_base_ = "./mask-rcnn_shufflemamba-base_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        backbone=dict(arch="middle", drop_path_rate=0.4),
        interaction_indexes=((0, 7), (8, 15), (16, 23), (24, 31)),
        num_heads=12,
    ),
    neck=dict(in_channels=[576, 576, 576, 576]),
)
