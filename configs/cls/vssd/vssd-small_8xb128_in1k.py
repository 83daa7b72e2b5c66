"""VSSD-S, 300 epochs on ImageNet-1k: a lower learning rate than VSSD-T's, 3e-4 for 512 images."""

_base_ = "./vssd-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="small"))

optim_wrapper = dict(optimizer=dict(lr=6e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=6e-6, by_epoch=True, begin=20),
]
