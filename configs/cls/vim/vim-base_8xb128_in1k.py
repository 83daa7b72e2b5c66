"""Vim-B, 300 epochs on ImageNet-1k: learning rate of Vim-Ti, weight decay of Vim-S; upstream has no script for it.

Upstream's weights are vim_b_midclstok_81p9acc.pth on https://huggingface.co/hustvl/Vim-base-midclstok (name of the file
as others quote it); by a third party the accuracy is that of the averaged weights, section "model_ema" of the file.
"""

_base_ = "./vim-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="base"), head=dict(in_channels=768))

optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
