"""UperNet with MambaOut-Small, 160k iterations on ADE20K at 512x512."""

_base_ = "./mambaout-tiny_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (84.1 % top-1 as published).
checkpoint = "https://github.com/yuweihao/MambaOut/releases/download/model/mambaout_small.pth"
model = dict(backbone=dict(arch="small", init_cfg=dict(checkpoint=checkpoint)))
