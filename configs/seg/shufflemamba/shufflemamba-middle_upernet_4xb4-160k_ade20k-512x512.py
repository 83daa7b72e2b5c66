"""UPerNet with ShuffleMamba-M, 160k iterations on ADE20K at 512x512."""

_base_ = "./shufflemamba-base_upernet_4xb4-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(arch="middle", drop_path_rate=0.3),
    decode_head=dict(in_channels=[576, 576, 576, 576]),
    auxiliary_head=dict(in_channels=576),
)
