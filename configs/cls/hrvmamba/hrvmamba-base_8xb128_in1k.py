"""HRVMamba-B, 300 epochs on ImageNet-1k: mmpretrain's Swin recipe, 8 GPUs x 128 images.

The official weights are in Google Drive, as a file that a browser gets:
https://drive.google.com/file/d/1jbXjvCBdjgraeEaJrDjD2wStpxJtCEuy/view
"""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

model = dict(
    # The classifier pools the last fused map as it is.
    backbone=dict(_delete_=True, type="mmvmamba.HRVMamba", arch="base", out_indices=(3,), out_norms=False),
    head=dict(in_channels=2048),
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
