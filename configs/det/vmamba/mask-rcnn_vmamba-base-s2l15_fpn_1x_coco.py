"""Mask R-CNN with VMamba-B [s2l15] and FPN, 12 epochs on COCO."""

_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"

# The official ImageNet weights (83.9 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_base_0229_ckpt_epoch_237.pth"
model = dict(
    backbone=dict(arch="base-s2l15", init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
