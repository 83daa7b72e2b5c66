"""MobileMamba-S6, 300 epochs on ImageNet-1k at 224x224: upstream's recipe on mmpretrain's of Swin, 8 GPUs x 128."""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.MobileMamba", arch="s6", out_indices=(3,)),
    # A batch norm before the linear map.
    head=dict(
        _delete_=True,
        type="mmvmamba.MobileMambaClsHead",
        num_classes=1000,
        in_channels=448,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
)

# bfloat16 has the range of float32, so nothing is scaled. The constructor spares what the backbone wants without weight
# decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(lr=3e-3),
)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

custom_hooks = [dict(type="EMAHook", momentum=2e-4, priority="ABOVE_NORMAL")]
