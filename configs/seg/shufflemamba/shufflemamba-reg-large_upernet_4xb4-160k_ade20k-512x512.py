"""UPerNet with ShuffleMamba-Reg-L, 160k iterations on ADE20K at 512x512.

Its registers are left out, as by upstream: the feature extractor has none.
"""

_base_ = "./shufflemamba-base_upernet_4xb4-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(arch="reg-large", drop_path_rate=0.3),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)

optim_wrapper = dict(optimizer=dict(lr=3e-5), clip_grad=dict(max_norm=5.0))
