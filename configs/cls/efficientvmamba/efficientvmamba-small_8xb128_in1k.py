"""EfficientVMamba-S, 300 epochs on ImageNet-1k.

Upstream's yaml of S has 96 channels in the first stage; its logs, its published size and its weights have 64.
"""

_base_ = "./efficientvmamba-tiny_8xb128_in1k.py"

# The published weights are https://huggingface.co/TerryPei/EfficientVMamba-Small (no address of a file is known).
model = dict(backbone=dict(arch="small"), head=dict(in_channels=512))
