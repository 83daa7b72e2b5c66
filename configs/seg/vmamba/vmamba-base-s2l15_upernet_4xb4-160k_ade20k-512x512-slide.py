"""The same model tested in overlapping windows of 512x512, the size it is trained at."""

_base_ = "./vmamba-base-s2l15_upernet_4xb4-160k_ade20k-512x512.py"

model = dict(test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)))
