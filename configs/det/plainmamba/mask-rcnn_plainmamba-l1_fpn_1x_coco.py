"""Mask R-CNN with PlainMamba-L1 in a ViT-adapter and FPN, 12 epochs on COCO: mmdet's Swin recipe, 8 GPUs x 2 images.

As in upstream, norms of the adapter, the pyramid and the box head are those of all GPUs, and no bias has weight decay.
The batch norms inside PlainMamba are those of one GPU, where upstream's were of all.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

# The official ImageNet weights (77.9 % top-1 as published), downloaded when a training starts.
checkpoint = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/l1.pth"
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.ViTAdapter",
        backbone=dict(
            type="mmvmamba.PlainMamba",
            arch="l1",
            drop_path_rate=0.1,
            final_norm=False,
            init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
        ),
        num_heads=6,
        norm="synchronised_batch_norm",
    ),
    neck=dict(in_channels=[192, 192, 192, 192], norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=norm_cfg)),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round boxes and anchors to it, and mmcv's kernels refuse it.
# The constructor adds to the recipe's rule for norms what the backbone wants without weight decay.
optim_wrapper = dict(
    type="mmvmamba.Bfloat16OptimWrapper",
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    paramwise_cfg=dict(bias_decay_mult=0.0),
)
