"""UperNet with VMamba-T [s2l5], 160k iterations on ADE20K at 512x512."""

_base_ = "./vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (82.5 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth"
model = dict(backbone=dict(arch="tiny-s2l5", init_cfg=dict(checkpoint=checkpoint)))
