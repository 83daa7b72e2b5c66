"""UperNet with Vim-S, 60k iterations on ADE20K at 512x512, tested in windows, 4 GPUs x 8 images.

Unlike Vim-Ti's, its features are the residual stream, and both streams are rotated by their positions.
"""

_base_ = "./vim-tiny_upernet_4xb8-60k_ade20k-512x512-slide.py"

# Upstream publishes a page for its ImageNet weights, no address of a file: name it in backbone.init_cfg
# (vim_s_midclstok_80p5acc.pth on https://huggingface.co/hustvl/Vim-small-midclstok).
model = dict(
    backbone=dict(arch="small", feature="residual", last_feature="residual", rope="both"),
    neck=dict(in_channels=384),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "backbone.patch_embed": dict(lr_mult=0.95**25),
            "backbone.pos_embed": dict(lr_mult=0.95**25),
        }
    ),
)
