"""UperNet with vanilla VMamba-B, 160k iterations on ADE20K at 512x512."""

_base_ = "./vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (83.7 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth"
model = dict(
    backbone=dict(arch="vanilla-base", init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
