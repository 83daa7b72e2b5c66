"""Mask R-CNN with MSVMamba-M and FPN, 36 epochs of many scales on COCO."""

_base_ = "./mask-rcnn_msvmamba-v1-tiny_fpn_ms-crop-3x_coco.py"

# The official ImageNet weights (79.8 % top-1 as published) are vssm_micro_ms_e300.pth in such a folder.
model = dict(backbone=dict(arch="v1-micro"), neck=dict(in_channels=[64, 128, 256, 512]))
