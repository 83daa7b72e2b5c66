"""Mask R-CNN with VMamba-S [s2l15] and FPN, 36 epochs of many scales on COCO."""

_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"

# The official ImageNet weights (83.6 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_small_0229_ckpt_epoch_222.pth"
model = dict(backbone=dict(arch="small-s2l15", init_cfg=dict(checkpoint=checkpoint)))
