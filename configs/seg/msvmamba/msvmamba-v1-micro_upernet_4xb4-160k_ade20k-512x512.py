"""UperNet with MSVMamba-M, 160k iterations on ADE20K at 512x512."""

_base_ = "./msvmamba-v1-tiny_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (79.8 % top-1 as published) are vssm_micro_ms_e300.pth in such a folder. Upstream's
# config leaves out the stochastic depth, and so trained with that of the Swin config below it.
model = dict(
    backbone=dict(arch="v1-micro", drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
