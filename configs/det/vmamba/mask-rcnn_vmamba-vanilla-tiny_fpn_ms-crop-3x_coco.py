"""Mask R-CNN with vanilla VMamba-T and FPN, 36 epochs of many scales on COCO."""

_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"

# The official ImageNet weights (82.2 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"
model = dict(backbone=dict(arch="vanilla-tiny", init_cfg=dict(checkpoint=checkpoint)))
