"""Mask R-CNN with EfficientVMamba-B and FPN, 36 epochs of many scales on COCO: mmdet's Swin recipe, 8 x 2 images."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"

# No address of the ImageNet weights is known but https://huggingface.co/TerryPei/EfficientVMamba-Base: download the
# file and name it, --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(backbone=dict(_delete_=True, type="mmvmamba.EfficientVMamba", arch="base", drop_path_rate=0.2))

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round boxes and anchors to it, and mmcv's kernels refuse it.
# The constructor adds to the recipe's rule for norms what the backbone wants without weight decay.
optim_wrapper = dict(type="mmvmamba.Bfloat16OptimWrapper", constructor="mmvmamba.SSMOptimWrapperConstructor")
