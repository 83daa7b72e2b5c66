"""Mask R-CNN with VMamba-T [s2l5] and FPN, 12 epochs on COCO."""

_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"

# The official ImageNet weights (82.5 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth"
model = dict(backbone=dict(arch="tiny-s2l5", init_cfg=dict(checkpoint=checkpoint)))
