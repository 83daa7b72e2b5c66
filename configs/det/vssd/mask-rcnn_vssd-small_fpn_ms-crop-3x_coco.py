"""Mask R-CNN with VSSD-S and FPN, 36 epochs of many scales on COCO.

Upstream publishes the result and no config; this is that of the smaller ones with the variant replaced.
"""

_base_ = "./mask-rcnn_vssd-tiny_fpn_ms-crop-3x_coco.py"

# The official ImageNet weights (84.1 % top-1 as published).
checkpoint = "https://huggingface.co/YuhengSSS/VSSD/resolve/main/vssd_small_best_ema.pth"
model = dict(backbone=dict(arch="small", init_cfg=dict(checkpoint=checkpoint)))
