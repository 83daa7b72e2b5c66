"""Vim-S+, fine-tuned for 30 epochs with overlapping patches of stride 8; 8 GPUs x 128 images.

It starts from the weights of vim-small (``load_from``). Upstream's weights are vim_s_midclstok_ft_81p6acc.pth on
https://huggingface.co/hustvl/Vim-small-midclstok (name of the file as others quote it).
"""

_base_ = "./vim-tiny-plus_8xb128_in1k.py"

model = dict(backbone=dict(arch="small-plus"), head=dict(in_channels=384))
