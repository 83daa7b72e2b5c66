"""ShuffleMamba-Reg-B, the first of upstream's three trainings: 300 epochs on ImageNet-1k at 128x128.

The others start from its result: ``shufflemamba-reg-base_8xb128-100e_in1k.py``, then ``..._8xb128_in1k.py``. Learning
rate, weight decay, stochastic depth and augmentation are upstream's; warm-up, clipping, mixup and what else is not told
here are those of the model without registers.
"""

_base_ = "./shufflemamba-base_8xb128_in1k.py"

model = dict(
    backbone=dict(arch="reg-base", img_size=128, drop_path_rate=0.1, shuffle_rate=0.1),
    head=dict(
        _delete_=True,
        type="mmvmamba.RegisterClsHead",
        num_classes=1000,
        in_channels=768,
        num_registers=12,
        reduction=4,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.0, mode="original"),
    ),
)

optim_wrapper = dict(optimizer=dict(weight_decay=0.05))

# ThreeAugment of DeiT III (https://arxiv.org/abs/2204.07118): gray, solarised or blurred, then colours.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=128, backend="pillow", interpolation="bicubic"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomGrayscale", prob=1.0, keep_channels=True)],
            [dict(type="Solarize", thr=128, prob=1.0)],
            [dict(type="GaussianBlur", magnitude_range=(0.1, 2.0), magnitude_std="inf", prob=1.0)],
        ],
    ),
    dict(type="ColorJitter", brightness=0.3, contrast=0.3, saturation=0.3),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=146, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=128),
    dict(type="PackInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
