"""Mask R-CNN with EfficientVMamba-T and FPN, 12 epochs on COCO: mmdet's Swin recipe, 8 GPUs x 2 images.

Upstream's own config cannot load its weights: it builds 9 blocks in the third stage, where they have 4, and an FPN for
twice the channels. Depths, widths and FPN are those of the weights here; stochastic depth of 0.2 is upstream's.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

# No address of the ImageNet weights is known but https://huggingface.co/TerryPei/EfficientVMamba-Tiny: download the
# file and name it, --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.EfficientVMamba", arch="tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[48, 96, 192, 384]),
)

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round boxes and anchors to it, and mmcv's kernels refuse it.
# The constructor adds to the recipe's rule for norms what the backbone wants without weight decay.
optim_wrapper = dict(type="mmvmamba.Bfloat16OptimWrapper", constructor="mmvmamba.SSMOptimWrapperConstructor")
