"""UperNet with vanilla VMamba-S, 160k iterations on ADE20K at 512x512."""

_base_ = "./vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (83.5 % top-1 as published).
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth"
model = dict(backbone=dict(arch="vanilla-small", init_cfg=dict(checkpoint=checkpoint)))
