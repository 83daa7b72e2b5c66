"""MobileMamba-B2, 300 epochs on ImageNet-1k at 384x384."""

_base_ = "./mobilemamba-s6_8xb128_in1k.py"

model = dict(backbone=dict(arch="b2"))

# Those of the recipe at 384x384; the shorter side of a test image is longer by the same 1 / 0.875.
train_pipeline = _base_.train_pipeline
train_pipeline[1]["scale"] = 384
test_pipeline = _base_.test_pipeline
test_pipeline[1]["scale"], test_pipeline[2]["crop_size"] = 438, 384
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
