"""Mask R-CNN with MobileMamba-B1 and its pyramid, 12 epochs on COCO, 8 GPUs x 2 images.

Upstream's recipe (4 GPUs x 4 images) on mmdet's of Swin: AdamW with a learning rate of 2e-4, clipping, a cosine in the
second half, batch norms of the backbone with the statistics of ImageNet. Upstream decays their weights; here they are
spared as in all families.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

# Upstream starts from mobilemamba_b1.pth (79.9 % top-1 as published), which is on Google Drive (see the README of
# https://github.com/lewandofskee/MobileMamba): download the file and name it,
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.MobileMamba", arch="b1", norm_eval=True),
    neck=dict(
        _delete_=True,
        type="mmvmamba.EfficientViTFPN",
        in_channels=[200, 376, 448],
        out_channels=256,
        num_outs=5,
        num_extra_trans_convs=2,
    ),
)

# Warm-up, constant to the middle, then a cosine to 0.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=True, begin=6, end=12, T_max=6, convert_to_iter_based=True),
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
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
