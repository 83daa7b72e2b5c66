"""EfficientVMamba-T, 300 epochs on ImageNet-1k, 8 GPUs x 128 images.

The recipe of upstream's training logs in mmpretrain's words: its Swin recipe with their learning rate, weight decay,
schedule, clipping, mixup and stochastic depth (0.1; upstream's yaml says 0.2). They trained T and S on 2048 images at
a time with twice this learning rate. Their colour jitter of 0.3 is left out.
"""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

# The published weights are https://huggingface.co/TerryPei/EfficientVMamba-Tiny (no address of a file is known).
model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.EfficientVMamba", arch="tiny", out_indices=(3,)),
    head=dict(in_channels=384),
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.2), dict(type="CutMix", alpha=1.0)]),
)

# bfloat16 has the range of float32, so nothing is scaled. The recipe spares norms and biases from weight decay; the
# constructor spares what else the backbone wants without it.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(lr=1e-3, weight_decay=0.04),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-4, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=20),
]

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

# The published accuracies are those of such averaged weights.
custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
