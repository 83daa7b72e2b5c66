"""UperNet with MambaOut-Tiny, 160k iterations on ADE20K at 512x512: mmseg's Swin recipe, 4 GPUs x 4 images.

Upstream published no code for it. Learning rate, batch and iterations are the paper's; crop, weight decay, warm-up and
stochastic depth it does not tell: they are the recipe's and that of ImageNet.
"""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

# The official ImageNet weights (82.7 % top-1 as published), downloaded when a training starts.
checkpoint = "https://github.com/yuweihao/MambaOut/releases/download/model/mambaout_tiny.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.MambaOut",
        arch="tiny",
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 576]),
    auxiliary_head=dict(in_channels=384),
)

# bfloat16 has the range of float32, so nothing is scaled. The constructor adds to the recipe's rule for norms what the
# backbone wants without weight decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(lr=1e-4),
)

train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(enable=False, base_batch_size=16)
