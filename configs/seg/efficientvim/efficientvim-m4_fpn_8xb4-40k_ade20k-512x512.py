"""Semantic FPN with EfficientViM-M4, 40k iterations on ADE20K at 512x512, 8 GPUs x 4 images.

Upstream's recipe on mmseg's of ResNet: AdamW, polynomial decline of power 0.9, batch norms of the backbone with the
statistics of ImageNet, tested with sides rounded up to multiples of 32. As in upstream's file the head is told strides
4 to 32 where they are 16 to 128: it uses their ratios alone.
"""

_base_ = "mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py"

# Upstream starts from EfficientViM_M4_e450.pth (79.6 % top-1 as published), which is on Google Drive (see the README of
# https://github.com/mlvlab/EfficientViM): download the file and name it,
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="mmvmamba.EfficientViM", arch="m4", norm_eval=True),
    neck=dict(in_channels=[224, 320, 512]),
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32),
    # The ground truth is not resized.
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

# bfloat16 has the range of float32, so nothing is scaled. The constructor spares what the backbone wants without weight
# decay.
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4),
)
param_scheduler = [dict(type="PolyLR", eta_min=1e-6, power=0.9, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
auto_scale_lr = dict(enable=False, base_batch_size=32)
