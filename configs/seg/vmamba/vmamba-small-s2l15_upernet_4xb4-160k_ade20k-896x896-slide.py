"""The same model tested in windows of 896x896: for a larger image only class scores grow, in main memory."""

_base_ = "./vmamba-small-s2l15_upernet_4xb4-160k_ade20k-896x896.py"

model = dict(
    type="mmvmamba.WindowedEncoderDecoder",
    test_cfg=dict(mode="slide", crop_size=(896, 896), stride=(597, 597)),
)
