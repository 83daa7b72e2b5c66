"""EfficientViM-M3, 300 epochs on ImageNet-1k."""

_base_ = "./efficientvim-m1_8xb256_in1k.py"

model = dict(backbone=dict(arch="m3"), head=dict(in_channels=[224, 320, 512]))
