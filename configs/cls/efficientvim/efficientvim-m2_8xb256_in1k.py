"""EfficientViM-M2, 300 epochs on ImageNet-1k."""

_base_ = "./efficientvim-m1_8xb256_in1k.py"

model = dict(backbone=dict(arch="m2"), head=dict(in_channels=[128, 256, 512]))
