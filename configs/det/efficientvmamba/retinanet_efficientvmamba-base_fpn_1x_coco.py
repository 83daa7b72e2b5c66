"""RetinaNet with EfficientVMamba-B and FPN, 12 epochs on COCO."""

_base_ = "./retinanet_efficientvmamba-tiny_fpn_1x_coco.py"

# The ImageNet weights: https://huggingface.co/TerryPei/EfficientVMamba-Base
model = dict(backbone=dict(arch="base"), neck=dict(in_channels=[192, 384, 768]))
