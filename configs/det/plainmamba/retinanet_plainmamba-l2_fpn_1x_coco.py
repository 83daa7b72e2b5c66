"""RetinaNet with PlainMamba-L2 in a ViT-adapter and FPN, 12 epochs on COCO."""

_base_ = "./retinanet_plainmamba-l1_fpn_1x_coco.py"

# The official ImageNet weights (81.6 % top-1 as published).
checkpoint = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/l2.pth"
model = dict(
    backbone=dict(
        backbone=dict(arch="l2", drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)),
    ),
    neck=dict(in_channels=[384, 384, 384]),
)
