"""ShuffleMamba-S, 300 epochs on ImageNet-1k.

Upstream has a script for the base model alone: this is its recipe, and less stochastic depth is our choice.
"""

_base_ = "./shufflemamba-base_8xb128_in1k.py"

model = dict(backbone=dict(arch="small"), head=dict(in_channels=384))
