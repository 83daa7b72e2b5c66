"""PlainMamba-L1, 300 epochs on ImageNet-1k: mmpretrain's Swin recipe, 8 GPUs x 128 images, and a shorter warm-up.

Upstream trains it with 8 x 256 images at twice the learning rate, which is the same rate per image.
"""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.PlainMamba", arch="l1", out_indices=(23,)),
    head=dict(in_channels=192),
)

# bfloat16 has the range of float32, so nothing is scaled. The recipe spares norms and biases from weight decay; the
# constructor spares what else the backbone wants without it.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=15, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=15),
]

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)
