"""DeepLabv3 with MobileMamba-B4, 80k iterations on ADE20K at 512x512, 4 GPUs x 8 images.

Upstream's recipe on mmseg's of ResNet: a head of 256 channels on the last map, an auxiliary one on that before; AdamW,
clipping, a cosine in the second half. The width of the auxiliary head is not published: 128 channels give the published
parameters of DeepLabv3.
"""

_base_ = "mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-80k_ade20k-512x512.py"

# Upstream starts from mobilemamba_b4.pth (82.5 % top-1 as published), which is on Google Drive (see the README of
# https://github.com/lewandofskee/MobileMamba): download the file and name it,
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="mmvmamba.MobileMamba", arch="b4"),
    decode_head=dict(in_channels=448, in_index=2, channels=256),
    auxiliary_head=dict(in_channels=376, in_index=1, channels=128),
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
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
# Warm-up, constant to the middle, then a cosine to 0.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=40000, end=80000, T_max=40000),
]

train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(enable=False, base_batch_size=32)
