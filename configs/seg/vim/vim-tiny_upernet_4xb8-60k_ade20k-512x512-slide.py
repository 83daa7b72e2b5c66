"""UperNet with Vim-Ti, 60k iterations on ADE20K at 512x512, tested in windows: mmseg's Swin recipe, 4 GPUs x 8 images.

Upstream's numbers: its backbone gives the mixers' outputs of four layers, without a norm, to a pyramid of its own. Its
rule for learning rates by layers looks for names that the backbone does not have, so that patches and position
embedding alone are slowed down; the published result was trained so, and so is this. Upstream decays the position
embedding, which is spared here.
"""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

# Upstream publishes a page for its ImageNet weights, no address of a file: name it in backbone.init_cfg
# (vim_t_midclstok_76p1acc.pth on https://huggingface.co/hustvl/Vim-tiny-midclstok).
model = dict(
    type="mmvmamba.WindowedEncoderDecoder",
    backbone=dict(
        _delete_=True,
        type="mmvmamba.Vim",
        arch="tiny",
        img_size=512,
        cls_token="none",  # noqa: S106 (no password)
        feature="hidden",
        last_feature="hidden",
        drop_path_rate=0.1,
    ),
    neck=dict(type="mmvmamba.FourScalePyramid", in_channels=192, norm="sync_batch_norm"),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

# bfloat16 has the range of float32, so nothing is scaled. Slowed down is by 0.92 to the power of 25, see above.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={
            "backbone.patch_embed": dict(lr_mult=0.92**25),
            "backbone.pos_embed": dict(lr_mult=0.92**25),
        },
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
train_cfg = dict(max_iters=60000, val_interval=6000)
default_hooks = dict(checkpoint=dict(interval=6000))

train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(enable=False, base_batch_size=32)
