"""ShuffleMamba-B, 300 epochs on ImageNet-1k: mmpretrain's Swin recipe with upstream's numbers, 8 GPUs x 128 images.

Upstream trains with 2048 images and a learning rate of 2e-3, which is this one by the linear rule: ``--auto-scale-lr``
on 16 GPUs gives it. Mixup, CutMix, RandAugment, erasing, smoothing, clipping, warm-up and the moving average are
upstream's, and so is that an image comes three times in a row, each to another GPU (repeated augmentation).
"""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.ShuffleMamba", arch="base", out_type="cls_token", shuffle_rate=0.5),
    neck=None,
    head=dict(
        _delete_=True,
        type="LinearClsHead",
        num_classes=1000,
        in_channels=768,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
        init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    ),
    # The recipe's would redraw the linear maps of the mixers, whose initial values are the backbone's business.
    init_cfg=None,
)

# bfloat16 has the range of float32, so nothing is scaled. The recipe spares norms and biases from weight decay; the
# constructor spares what else the backbone wants without it.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1),
    clip_grad=dict(max_norm=3.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=2.5e-4, by_epoch=True, end=30, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, by_epoch=True, begin=30),
]

train_dataloader = dict(batch_size=128, sampler=dict(type="RepeatAugSampler", shuffle=True))
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
