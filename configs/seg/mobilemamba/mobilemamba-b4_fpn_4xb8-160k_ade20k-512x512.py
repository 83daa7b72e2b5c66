"""Semantic FPN with MobileMamba-B4, 160k iterations on ADE20K at 512x512, 4 GPUs x 8 images.

Upstream's recipe on mmseg's of ResNet: AdamW, ten times the learning rate in the head, a cosine in the second half.
"""

_base_ = "mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py"

# Upstream starts from mobilemamba_b4.pth (82.5 % top-1 as published), which is on Google Drive (see the README of
# https://github.com/lewandofskee/MobileMamba): download the file and name it,
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="mmvmamba.MobileMamba", arch="b4"),
    neck=dict(in_channels=[200, 376, 448], num_outs=3),
    decode_head=dict(in_channels=[256, 256, 256], in_index=[0, 1, 2], feature_strides=[16, 32, 64]),
)

# bfloat16 has the range of float32, so nothing is scaled. The constructor spares what the backbone wants without weight
# decay.
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1.2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.0))),
)
# Warm-up, constant to the middle, then a cosine to 0.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=80000, end=160000, T_max=80000),
]

train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(enable=False, base_batch_size=32)
