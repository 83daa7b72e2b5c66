"""UperNet with VSSD-M, 160k iterations on ADE20K at 512x512.

Upstream publishes a result and a file, and no config: stochastic depth 0.1 is our choice, that of its detectors.
"""

_base_ = "./vssd-tiny_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (82.5 % top-1 as published).
checkpoint = "https://huggingface.co/YuhengSSS/VSSD/resolve/main/vssd_micro_best.pth"
model = dict(
    backbone=dict(arch="micro", drop_path_rate=0.1, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
