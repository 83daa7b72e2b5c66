"""ShuffleMamba-Reg-B, the last of upstream's three trainings: 20 epochs on ImageNet-1k at 224x224.

It starts from the result of the second: ``--cfg-options load_from=work_dirs/.../epoch_100.pth``. Upstream has 512
images in a batch and a learning rate of 1e-5, which is this one by the linear rule. Weight decay, stochastic depth,
smoothing and tests at 224 without margin are upstream's; the augmentation of this part is not told, and is that of the
model without registers.
"""

_base_ = "./shufflemamba-base_8xb128_in1k.py"

model = dict(
    backbone=dict(arch="reg-base", drop_path_rate=0.4, shuffle_rate=0.1),
    head=dict(
        _delete_=True,
        type="mmvmamba.RegisterClsHead",
        num_classes=1000,
        in_channels=768,
        num_registers=12,
        reduction=4,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
)

optim_wrapper = dict(optimizer=dict(lr=2e-5))
param_scheduler = [
    dict(type="LinearLR", start_factor=2.5e-2, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, by_epoch=True, begin=5),
]
train_cfg = dict(max_epochs=20)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=224, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
