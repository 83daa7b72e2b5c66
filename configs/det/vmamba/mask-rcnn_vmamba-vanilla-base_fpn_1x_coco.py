"""Mask R-CNN with vanilla VMamba-B and FPN, 12 epochs on COCO."""

_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"

# The official ImageNet weights (83.7 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth"
model = dict(
    backbone=dict(arch="vanilla-base", init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
