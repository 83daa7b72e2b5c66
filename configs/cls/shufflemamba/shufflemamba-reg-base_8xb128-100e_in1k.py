"""ShuffleMamba-Reg-B, the second of upstream's three trainings: 100 epochs on ImageNet-1k at 224x224.

It starts from the result of the first: ``--cfg-options load_from=work_dirs/.../epoch_300.pth``. The position embedding
is resized when it is loaded.
"""

_base_ = "./shufflemamba-reg-base_8xb128-300e_in1k-128px.py"

model = dict(backbone=dict(img_size=224, drop_path_rate=0.4))

# 2e-4 for 512 images by upstream's rule.
optim_wrapper = dict(optimizer=dict(lr=4e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=2.5e-4, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, by_epoch=True, begin=5),
]
train_cfg = dict(max_epochs=100)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=224, backend="pillow", interpolation="bicubic"),
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
    dict(type="ResizeEdge", scale=256, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
