"""RetinaNet with PlainMamba-L3 in a ViT-adapter and FPN, 12 epochs on COCO."""

_base_ = "./retinanet_plainmamba-l1_fpn_1x_coco.py"

# The official ImageNet weights (82.3 % top-1 as published).
checkpoint = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/l3.pth"
model = dict(
    backbone=dict(
        backbone=dict(arch="l3", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint)),
        num_heads=8,
    ),
    neck=dict(in_channels=[448, 448, 448]),
)
