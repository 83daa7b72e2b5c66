"""EfficientViM-M2, 450 epochs on ImageNet-1k."""

_base_ = "./efficientvim-m2_8xb256_in1k.py"

train_cfg = dict(max_epochs=450)
