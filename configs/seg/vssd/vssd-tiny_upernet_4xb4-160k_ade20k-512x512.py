"""UperNet with VSSD-T, 160k iterations on ADE20K at 512x512: mmseg's Swin recipe, 4 GPUs x 4 images."""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

# The official ImageNet weights (83.6 % top-1 as published), downloaded when a training starts.
checkpoint = "https://huggingface.co/YuhengSSS/VSSD/resolve/main/vssd_tiny_best_ema.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VSSD",
        arch="tiny",
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

# bfloat16 has the range of float32, so nothing is scaled. The constructor adds to the recipe's rule for norms what the
# backbone wants without weight decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
)

train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(enable=False, base_batch_size=16)
