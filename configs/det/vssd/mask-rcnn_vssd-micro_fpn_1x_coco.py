"""Mask R-CNN with VSSD-M and FPN, 12 epochs on COCO; stochastic depth 0.1, half of that on ImageNet."""

_base_ = "./mask-rcnn_vssd-tiny_fpn_1x_coco.py"

# The official ImageNet weights (82.5 % top-1 as published).
checkpoint = "https://huggingface.co/YuhengSSS/VSSD/resolve/main/vssd_micro_best.pth"
model = dict(
    backbone=dict(arch="micro", drop_path_rate=0.1, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
