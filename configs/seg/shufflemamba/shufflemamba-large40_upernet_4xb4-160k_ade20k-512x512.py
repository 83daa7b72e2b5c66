"""UPerNet with ShuffleMamba-L of 40 layers, 160k iterations on ADE20K at 512x512."""

_base_ = "./shufflemamba-base_upernet_4xb4-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(arch="large40", drop_path_rate=0.2),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)

optim_wrapper = dict(optimizer=dict(lr=3e-5), clip_grad=dict(max_norm=3.0))
