"""Mask R-CNN with ShuffleMamba-B in a ViT-adapter and FPN, 12 epochs on COCO: mmdet's Swin recipe, 8 GPUs x 2 images.

Learning rates fall from layer to layer, the last trained at the full one. The norms are those of the classifier;
upstream's config has layer norms where the classifier it starts from has RMS norms.

Upstream has released no weights: start the part inside the adapter from a classifier of your own with
``--cfg-options model.backbone.backbone.init_cfg.type=Pretrained model.backbone.backbone.init_cfg.checkpoint=FILE``.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.ViTAdapter",
        backbone=dict(
            type="mmvmamba.ShuffleMamba",
            arch="base",
            cls_token="none",  # noqa: S106 (no password)
            drop_path_rate=0.3,
        ),
        interaction_indexes=((0, 5), (6, 11), (12, 17), (18, 23)),
        num_heads=12,
        value_ratio=0.5,
        trunk_features="each",
        norm="synchronised_batch_norm",
    ),
    neck=dict(in_channels=[768, 768, 768, 768], norm_cfg=dict(type="SyncBN", requires_grad=True)),
)

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round boxes and anchors to it, and mmcv's kernels refuse it.
# The constructor adds to the recipe's rule for norms what the backbone wants without weight decay.
optim_wrapper = dict(
    type="mmvmamba.Bfloat16OptimWrapper",
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.9),
)
