"""ShuffleMamba-L of 48 layers, 300 epochs on ImageNet-1k.

Upstream has a script for the base model alone: stochastic depth and the rest of the recipe are that one's.
"""

_base_ = "./shufflemamba-base_8xb128_in1k.py"

model = dict(backbone=dict(arch="large48"), head=dict(in_channels=1024))
