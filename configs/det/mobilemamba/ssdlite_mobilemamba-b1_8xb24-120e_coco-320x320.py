"""SSDLite with MobileMamba-B1, 120 epochs of a 5 times repeated COCO at 320x320, 8 GPUs x 24 images.

Upstream's recipe on mmdet's of MobileNetV2: AdamW, a cosine in the second half, batch norms of the backbone with the
statistics of ImageNet.
"""

_base_ = "mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py"

# Upstream starts from mobilemamba_b1.pth (79.9 % top-1 as published), which is on Google Drive (see the README of
# https://github.com/lewandofskee/MobileMamba): download the file and name it,
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.MobileMamba", arch="b1", out_indices=(1, 2), norm_eval=True),
    neck=dict(in_channels=(200, 376), out_channels=(200, 376, 512, 256, 256, 128)),
    # MMDetection's own fails in a test.
    bbox_head=dict(type="mmvmamba.SSDHead", in_channels=(200, 376, 512, 256, 256, 128)),
)

# Warm-up, constant to the middle, then a cosine to 0.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=True, begin=60, end=120, T_max=60, convert_to_iter_based=True),
]

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round anchors to it.
# The constructor spares what the backbone wants without weight decay.
optim_wrapper = dict(
    _delete_=True,
    type="mmvmamba.Bfloat16OptimWrapper",
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=2.4e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
