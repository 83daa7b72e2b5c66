"""EfficientVMamba-B, 300 epochs on ImageNet-1k: trained on 1024 images at a time with the learning rate of its log."""

_base_ = "./efficientvmamba-tiny_8xb128_in1k.py"

# The published weights are https://huggingface.co/TerryPei/EfficientVMamba-Base (no address of a file is known).
model = dict(backbone=dict(arch="base"), head=dict(in_channels=768))

optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-5, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=20),
]
