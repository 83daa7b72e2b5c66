"""The same model tested in overlapping windows of 640x640, the size it is trained at."""

_base_ = "./vmamba-small-s2l15_upernet_4xb4-160k_ade20k-640x640.py"

model = dict(test_cfg=dict(mode="slide", crop_size=(640, 640), stride=(426, 426)))
