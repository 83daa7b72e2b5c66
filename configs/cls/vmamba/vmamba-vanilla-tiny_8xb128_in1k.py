"""Vanilla VMamba-T, 300 epochs on ImageNet-1k."""

_base_ = "./vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(arch="vanilla-tiny"))
