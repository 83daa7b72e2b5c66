"""The same model tested in overlapping windows of 896x896, the size it is trained at."""

_base_ = "./vmamba-small-s2l15_upernet_4xb4-160k_ade20k-896x896.py"

model = dict(test_cfg=dict(mode="slide", crop_size=(896, 896), stride=(597, 597)))
