"""RetinaNet with VMamba-T [s1l8] and FPN, 12 epochs on COCO, 8 GPUs x 2 images.

The optimizer is AdamW, as in the Mask R-CNN recipes; mmdet's Swin config has SGD. Nobody has published a result of it.
"""

_base_ = "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"

# The official ImageNet weights (82.6 % top-1 as published), downloaded when a training starts.
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        out_indices=(1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    )
)

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round anchors to it, and mmcv's focal loss refuses it.
optim_wrapper = dict(
    _delete_=True,
    type="mmvmamba.Bfloat16OptimWrapper",
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
