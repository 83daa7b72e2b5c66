"""VSSD-M, 300 epochs on ImageNet-1k.

Stochastic depth 0.2, as upstream trains it: the 0.1 of its file is a key that its code does not read.
"""

_base_ = "./vssd-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="micro"), head=dict(in_channels=384))
