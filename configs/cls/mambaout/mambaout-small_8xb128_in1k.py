"""MambaOut-Small, 300 epochs on ImageNet-1k."""

_base_ = "./mambaout-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="small"))
