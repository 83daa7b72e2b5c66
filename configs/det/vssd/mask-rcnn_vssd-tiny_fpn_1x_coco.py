"""Mask R-CNN with VSSD-T and FPN, 12 epochs on COCO: mmdet's Swin recipe, 8 GPUs x 2 images."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

# The official ImageNet weights (83.6 % top-1 as published), downloaded when a training starts.
checkpoint = "https://huggingface.co/YuhengSSS/VSSD/resolve/main/vssd_tiny_best_ema.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VSSD",
        arch="tiny",
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round boxes and anchors to it, and mmcv's kernels refuse it.
# The constructor adds to the recipe's rule for norms what the backbone wants without weight decay.
optim_wrapper = dict(type="mmvmamba.Bfloat16OptimWrapper", constructor="mmvmamba.SSMOptimWrapperConstructor")
