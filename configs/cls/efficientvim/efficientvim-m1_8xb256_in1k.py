"""EfficientViM-M1, 300 epochs on ImageNet-1k: upstream's recipe on mmpretrain's of Swin, 8 GPUs x 256 images.

Upstream adds 10 epochs at the lowest learning rate, which are not here.
"""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.EfficientViM", arch="m1", out_type="hidden_states"),
    neck=None,
    head=dict(type="mmvmamba.EfficientViMClsHead", in_channels=[128, 192, 320]),
)

# bfloat16 has the range of float32, so nothing is scaled. The recipe spares norms and biases from weight decay; the
# constructor spares what else the backbone wants without it.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(lr=2e-3),
    clip_grad=dict(max_norm=0.02),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=2e-5, by_epoch=True, begin=20),
]

train_dataloader = dict(batch_size=256)
val_dataloader = dict(batch_size=256)
test_dataloader = dict(batch_size=256)
auto_scale_lr = dict(base_batch_size=2048)

custom_hooks = [dict(type="EMAHook", momentum=5e-4, priority="ABOVE_NORMAL")]
