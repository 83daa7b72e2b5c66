"""HRVMamba-S, 300 epochs on ImageNet-1k at 256x256: mmpretrain's Swin v2 recipe, 8 GPUs x 128 images.

256x256 is the size for which upstream gives the FLOPs of all its models but the largest; that it also trained and
tested them at this size is our reading. The official weights are in Google Drive, as a file that a browser gets:
https://drive.google.com/file/d/1Gxo0Pxg2D7x3dU0P2AZ2YGEFS-7XMxIX/view
"""

_base_ = "mmpretrain::swin_transformer_v2/swinv2-tiny-w8_16xb64_in1k-256px.py"

model = dict(
    # The classifier pools the last fused map as it is.
    backbone=dict(_delete_=True, type="mmvmamba.HRVMamba", arch="small", out_indices=(3,), out_norms=False),
    head=dict(in_channels=2048),
)

# bfloat16 has the range of float32, so nothing is scaled. The recipe spares norms and biases from weight decay; the
# constructor spares what else the backbone wants without it.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    clip_grad=dict(max_norm=5.0),
)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
