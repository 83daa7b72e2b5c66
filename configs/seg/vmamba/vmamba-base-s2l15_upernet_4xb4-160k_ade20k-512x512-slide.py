"""The same model tested in windows of 512x512: for a larger image only class scores grow, in main memory."""

_base_ = "./vmamba-base-s2l15_upernet_4xb4-160k_ade20k-512x512.py"

model = dict(
    type="mmvmamba.WindowedEncoderDecoder",
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
