"""PlainMamba-L2, 300 epochs on ImageNet-1k: gradients clipped more than L1's, a longer warm-up, averaged weights.

Upstream trains it with 8 x 256 images at twice the learning rate, which is the same rate per image, and stops its
average of the weights at epoch 250 by mistake; here it goes on.
"""

_base_ = "./plainmamba-l1_8xb128_in1k.py"

model = dict(backbone=dict(arch="l2"), head=dict(in_channels=384))

optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=20),
]

custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
