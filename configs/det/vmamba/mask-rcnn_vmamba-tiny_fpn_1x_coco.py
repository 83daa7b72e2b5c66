"""Mask R-CNN with VMamba-T [s1l8] and FPN, 12 epochs on COCO: mmdet's Swin recipe, 8 GPUs x 2 images."""

_base_ = ["mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "../../_base_/ssm_no_decay.py"]

# The official ImageNet weights (82.6 % top-1 as published), downloaded when a training starts.
checkpoint = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    )
)

# On top of the recipe's rule for norms.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.ssm_no_decay))
