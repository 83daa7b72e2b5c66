"""UperNet with PlainMamba-L1, 160k iterations on ADE20K at 512x512: mmseg's Swin recipe, 4 GPUs x 4 images.

UperNet stands on four maps of the same stride, 16, without a neck, as in upstream. Images are tested with both sides
resized to multiples of 32, as upstream's were.
"""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

# The official ImageNet weights (77.9 % top-1 as published), downloaded when a training starts.
checkpoint = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/l1.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.PlainMamba",
        arch="l1",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192, in_index=3),
)

# bfloat16 has the range of float32, so nothing is scaled. The constructor adds to the recipe's rule for norms what the
# backbone wants without weight decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32),
    # Behind the sizes: the labels stay as they are.
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(enable=False, base_batch_size=16)
