"""UperNet with VMamba-S [s2l15], 160k iterations on ADE20K at 512x512."""

_base_ = "./vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (83.6 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_small_0229_ckpt_epoch_222.pth"
model = dict(backbone=dict(arch="small-s2l15", init_cfg=dict(checkpoint=checkpoint)))
