"""MambaOut-Tiny, 300 epochs on ImageNet-1k: mmpretrain's Swin recipe, 8 GPUs x 128 images.

Upstream trains with 4096 images and a learning rate of 4e-3, which is this one by the linear rule: ``--auto-scale-lr``
on 32 GPUs gives it. Upstream's are also ten more epochs at the least learning rate, no clipping, no moving average, and
tests at 224 without margin. Mixup, CutMix, RandAugment, erasing and smoothing are the same in both recipes. Differences
from upstream: images are always resized bicubically, not at times bilinearly, and the cosine begins at its top after
the warm-up.
"""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.MambaOut", arch="tiny", out_indices=(3,), out_norms=False),
    # A norm and a perceptron behind the pooling.
    head=dict(
        _delete_=True,
        type="mmvmamba.MambaOutClsHead",
        num_classes=1000,
        in_channels=576,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
)

# bfloat16 has the range of float32, so nothing is scaled. As upstream, recipe and backbone spare norms and biases from
# weight decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    clip_grad=None,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=20, end=300),
]
train_cfg = dict(by_epoch=True, max_epochs=310, val_interval=1)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=224, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]
train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128, dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(batch_size=128, dataset=dict(pipeline=test_pipeline))
