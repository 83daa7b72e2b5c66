"""UperNet with MambaOut-Base, 160k iterations on ADE20K at 512x512."""

_base_ = "./mambaout-tiny_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (84.2 % top-1 as published).
checkpoint = "https://github.com/yuweihao/MambaOut/releases/download/model/mambaout_base.pth"
model = dict(
    backbone=dict(arch="base", init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[128, 256, 512, 768]),
    auxiliary_head=dict(in_channels=512),
)
