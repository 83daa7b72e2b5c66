"""Mask R-CNN with EfficientViM-M4 and its pyramid, 12 epochs on COCO, 8 GPUs x 2 images.

Upstream's recipe (one GPU x 16 images) on mmdet's of Swin: twice the learning rate, a warm-up of 500 iterations, batch
norms of the backbone with the statistics of ImageNet, weight decay for heads and neck without exception.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

# Upstream starts from EfficientViM_M4_e450.pth (79.6 % top-1 as published), which is on Google Drive (see the README of
# https://github.com/mlvlab/EfficientViM): download the file and name it,
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.EfficientViM", arch="m4", norm_eval=True),
    neck=dict(
        _delete_=True,
        type="mmvmamba.EfficientViTFPN",
        in_channels=[224, 320, 512],
        out_channels=256,
        num_outs=5,
        num_extra_trans_convs=2,
        pre_norm=True,
    ),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round boxes and anchors to it, and mmcv's kernels refuse it.
# The constructor spares what the backbone wants without weight decay.
optim_wrapper = dict(
    _delete_=True,
    type="mmvmamba.Bfloat16OptimWrapper",
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
