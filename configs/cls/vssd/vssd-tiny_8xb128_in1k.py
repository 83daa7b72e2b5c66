"""VSSD-T, 300 epochs on ImageNet-1k: mmpretrain's Swin recipe, 8 GPUs x 128 images.

This is upstream's recipe too. Its models "with MESA" had a loss against their own running average besides, which is not
here.
"""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.VSSD", arch="tiny", out_indices=(3,)),
    head=dict(in_channels=512),
)

# bfloat16 has the range of float32, so nothing is scaled. The recipe spares norms and biases from weight decay; the
# constructor spares what else the backbone wants without it.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
