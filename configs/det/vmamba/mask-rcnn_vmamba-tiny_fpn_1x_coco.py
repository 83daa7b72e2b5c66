"""Mask R-CNN with VMamba-T [s1l8] and FPN, 12 epochs on COCO: mmdet's Swin recipe, 8 GPUs x 2 images."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

model = dict(backbone=dict(_delete_=True, type="mmvmamba.VMamba", arch="tiny-s1l8", drop_path_rate=0.2))

# On top of the recipe's rule for norms.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "A_logs": dict(decay_mult=0.0),
            "Ds": dict(decay_mult=0.0),
            "dt_projs_bias": dict(decay_mult=0.0),
        }
    )
)
