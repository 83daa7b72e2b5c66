"""UperNet with PlainMamba-L2, 160k iterations on ADE20K at 512x512."""

_base_ = "./plainmamba-l1_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (81.6 % top-1 as published).
checkpoint = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/l2.pth"
model = dict(
    backbone=dict(arch="l2", drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
