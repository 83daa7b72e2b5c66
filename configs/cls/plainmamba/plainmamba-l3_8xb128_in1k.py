"""PlainMamba-L3, 300 epochs on ImageNet-1k with 1024 images a step, as upstream trains it."""

_base_ = "./plainmamba-l2_8xb128_in1k.py"

model = dict(backbone=dict(arch="l3", out_indices=(35,)), head=dict(in_channels=448))
