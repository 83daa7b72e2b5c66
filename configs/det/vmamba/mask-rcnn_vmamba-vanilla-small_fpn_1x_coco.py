"""Mask R-CNN with vanilla VMamba-S and FPN, 12 epochs on COCO."""

_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"

# The official ImageNet weights (83.5 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth"
model = dict(backbone=dict(arch="vanilla-small", init_cfg=dict(checkpoint=checkpoint)))
