"""Mask R-CNN with MambaOut-Base and FPN, 12 epochs on COCO."""

_base_ = "./mask-rcnn_mambaout-tiny_fpn_1x_coco.py"

# The official ImageNet weights (84.2 % top-1 as published).
checkpoint = "https://github.com/yuweihao/MambaOut/releases/download/model/mambaout_base.pth"
model = dict(
    backbone=dict(arch="base", init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[128, 256, 512, 768]),
)
