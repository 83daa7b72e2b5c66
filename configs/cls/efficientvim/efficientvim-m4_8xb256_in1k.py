"""EfficientViM-M4, 300 epochs on ImageNet-1k at 256x256."""

_base_ = "./efficientvim-m1_8xb256_in1k.py"

model = dict(backbone=dict(arch="m4"), head=dict(in_channels=[224, 320, 512]))

# Those of the recipe at 256x256; the shorter side of a test image is longer by the same 256 / 224.
train_pipeline = _base_.train_pipeline
train_pipeline[1]["scale"] = 256
test_pipeline = _base_.test_pipeline
test_pipeline[1]["scale"], test_pipeline[2]["crop_size"] = 292, 256
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
