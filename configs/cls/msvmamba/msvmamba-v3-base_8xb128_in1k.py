"""MSVMamba-B (v3), 300 epochs on ImageNet-1k; the learning rate is lower than that of the others, as upstream's."""

_base_ = "./msvmamba-v1-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="v3-base"), head=dict(in_channels=1024))

optim_wrapper = dict(optimizer=dict(lr=6e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=6e-6, by_epoch=True, begin=20),
]
