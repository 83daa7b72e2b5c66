"""Mask R-CNN with MambaOut-Small and FPN, 12 epochs on COCO."""

_base_ = "./mask-rcnn_mambaout-tiny_fpn_1x_coco.py"

# The official ImageNet weights (84.1 % top-1 as published).
checkpoint = "https://github.com/yuweihao/MambaOut/releases/download/model/mambaout_small.pth"
model = dict(backbone=dict(arch="small", init_cfg=dict(checkpoint=checkpoint)))
