"""RetinaNet with PlainMamba-L1 in a ViT-adapter and FPN, 12 epochs on COCO, 8 GPUs x 2 images.

Optimiser and adapter are those of Mask R-CNN; norms of adapter and pyramid are those of all GPUs.
The pyramid leaves out the finest of the four maps, so the adapter does, too.
"""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

# The official ImageNet weights (77.9 % top-1 as published), downloaded when a training starts.
checkpoint = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/l1.pth"
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
        out_indices=(1, 2, 3),
    ),
    neck=dict(
        in_channels=[192, 192, 192],
        start_level=0,
        add_extra_convs="on_output",
        norm_cfg=dict(type="SyncBN", requires_grad=True),
    ),
)

val_evaluator = dict(type="FasterCocoMetric")
test_evaluator = dict(type="FasterCocoMetric", classwise=True)

# bfloat16 in backbone and neck alone: mmdet's heads would round boxes and anchors to it, and mmcv's kernels refuse it.
# The constructor adds what the backbone wants without weight decay.
optim_wrapper = dict(
    type="mmvmamba.Bfloat16OptimWrapper",
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=35, norm_type=2),
)
