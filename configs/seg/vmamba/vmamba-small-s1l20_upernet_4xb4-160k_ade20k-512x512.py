"""UperNet with VMamba-S [s1l20], 160k iterations on ADE20K at 512x512. Nobody has published a result of it."""

_base_ = "./vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (83.3 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth"
model = dict(backbone=dict(arch="small-s1l20", init_cfg=dict(checkpoint=checkpoint)))
