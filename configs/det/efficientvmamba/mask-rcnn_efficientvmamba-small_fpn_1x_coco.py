"""Mask R-CNN with EfficientVMamba-S and FPN, 12 epochs on COCO.

Upstream's own config cannot load its weights: it builds 96 channels in the first stage, where they have 64.
"""

_base_ = "./mask-rcnn_efficientvmamba-tiny_fpn_1x_coco.py"

# The ImageNet weights: https://huggingface.co/TerryPei/EfficientVMamba-Small
model = dict(backbone=dict(arch="small"), neck=dict(in_channels=[64, 128, 256, 512]))
