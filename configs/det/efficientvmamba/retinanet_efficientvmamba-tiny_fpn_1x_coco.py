"""RetinaNet with EfficientVMamba-T and FPN, 12 epochs on COCO, 8 GPUs x 2 images.

The paper has a result, upstream no config: this is our RetinaNet recipe for VMamba, with AdamW, and upstream's
stochastic depth in detectors, 0.2.
"""

_base_ = "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"

# No address of the ImageNet weights is known but https://huggingface.co/TerryPei/EfficientVMamba-Tiny: download the
# file and name it, --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(
    backbone=dict(
        _delete_=True, type="mmvmamba.EfficientVMamba", arch="tiny", out_indices=(1, 2, 3), drop_path_rate=0.2
    ),
    neck=dict(in_channels=[96, 192, 384]),
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
