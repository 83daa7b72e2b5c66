"""Vim-Ti+, fine-tuned for 30 epochs with overlapping patches of stride 8; 8 GPUs x 128 images.

It starts from the weights of vim-tiny (``load_from``), whose position embedding is resized from 14x14 to 27x27 patches
with the class token's row kept as it is; upstream takes the first row for that. Upstream's weights are
vim_t_midclstok_ft_78p3acc.pth on https://huggingface.co/hustvl/Vim-tiny-midclstok (name of the file as others quote
it).
"""

_base_ = "./vim-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="tiny-plus"))

optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type="ConstantLR", factor=1.0, by_epoch=True, begin=0, end=30)]
train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
