"""Vim-Ti, 300 epochs on ImageNet-1k: mmpretrain's Swin recipe with upstream's numbers, 8 GPUs x 128 images.

Upstream trains in float32 and without a limit to the gradient; A and the like have weight decay there. Its weights are
vim_t_midclstok_76p1acc.pth on https://huggingface.co/hustvl/Vim-tiny-midclstok (name of the file as others quote it).
"""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

# The class token is what is classified: nothing is pooled.
model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.Vim", arch="tiny", out_type="cls_token"),
    neck=None,
    head=dict(in_channels=192),
)

# bfloat16 has the range of float32, so nothing is scaled. The recipe spares norms and biases from weight decay; the
# constructor spares what else the backbone wants without it.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(weight_decay=0.1),
    clip_grad=None,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=5),
]

train_dataloader = dict(batch_size=128, sampler=dict(type="RepeatAugSampler", shuffle=True))
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

custom_hooks = [dict(type="EMAHook", momentum=4e-5, priority="ABOVE_NORMAL")]
