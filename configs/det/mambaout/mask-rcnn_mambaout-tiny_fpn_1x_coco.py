"""Mask R-CNN with MambaOut-Tiny and FPN, 12 epochs on COCO: mmdet's Swin recipe, 8 GPUs x 2 images.

Upstream published no code for it. The paper's learning rate, batch, epochs and scales are this recipe's; weight decay,
warm-up and stochastic depth it does not tell: they are the recipe's and that of ImageNet.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

# The official ImageNet weights (82.7 % top-1 as published), downloaded when a training starts.
checkpoint = "https://github.com/yuweihao/MambaOut/releases/download/model/mambaout_tiny.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.MambaOut",
        arch="tiny",
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[96, 192, 384, 576]),
)

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round boxes and anchors to it, and mmcv's kernels refuse it.
# The constructor adds to the recipe's rule for norms what the backbone wants without weight decay.
optim_wrapper = dict(type="mmvmamba.Bfloat16OptimWrapper", constructor="mmvmamba.SSMOptimWrapperConstructor")
