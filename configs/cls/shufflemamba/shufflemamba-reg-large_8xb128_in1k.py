"""ShuffleMamba-Reg-L, the last of three trainings: 20 epochs on ImageNet-1k at 224x224.

Upstream has scripts for the base model alone, and this is its recipe. For the two trainings before it take the base
model's files with this model: ``--cfg-options model.backbone.arch=reg-large`` and the same numbers of the head.
"""

_base_ = "./shufflemamba-reg-base_8xb128_in1k.py"

model = dict(backbone=dict(arch="reg-large"), head=dict(in_channels=1024, num_registers=16, reduction=8))
