"""MSVMamba-M, 300 epochs on ImageNet-1k."""

_base_ = "./msvmamba-v1-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="v1-micro"), head=dict(in_channels=512))
