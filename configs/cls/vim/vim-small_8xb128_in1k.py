"""Vim-S, 300 epochs on ImageNet-1k.

Upstream has 512 images and a learning rate of 1e-3, which is this one by the linear rule. Its weights are
vim_s_midclstok_80p5acc.pth on https://huggingface.co/hustvl/Vim-small-midclstok (name of the file as others quote it).
"""

_base_ = "./vim-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="small"), head=dict(in_channels=384))

optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.05))
