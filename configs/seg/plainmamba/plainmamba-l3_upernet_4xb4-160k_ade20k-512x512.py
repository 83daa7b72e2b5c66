"""UperNet with PlainMamba-L3, 160k iterations on ADE20K at 512x512."""

_base_ = "./plainmamba-l1_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (82.3 % top-1 as published).
checkpoint = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/l3.pth"
model = dict(
    backbone=dict(arch="l3", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[448, 448, 448, 448]),
    auxiliary_head=dict(in_channels=448),
)
