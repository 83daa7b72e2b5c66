"""Mask R-CNN with MSVMamba-T and FPN, 36 epochs of many scales on COCO: mmdet's Swin recipe, 8 GPUs x 2 images."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"

# The official ImageNet weights (82.8 % top-1 as published) are vssm_tiny_ms_e300.pth in a folder of Google Drive that
# the README of https://github.com/YuHengsss/MSVMamba links; files in it have no address to be named here. Download it
# and pass --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
model = dict(backbone=dict(_delete_=True, type="mmvmamba.MSVMamba", arch="v1-tiny"))

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round boxes and anchors to it, and mmcv's kernels refuse it.
# The constructor adds to the recipe's rule for norms what the backbone wants without weight decay.
optim_wrapper = dict(type="mmvmamba.Bfloat16OptimWrapper", constructor="mmvmamba.SSMOptimWrapperConstructor")
