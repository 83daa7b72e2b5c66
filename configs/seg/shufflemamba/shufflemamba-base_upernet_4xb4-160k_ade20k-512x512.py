"""UPerNet with ShuffleMamba-B, 160k iterations on ADE20K at 512x512: mmseg's Swin recipe, 4 GPUs x 4 images.

The four maps have one stride, 16, and no neck makes a pyramid of them. Tests are in windows of 512x512, as upstream's.
The norms are those of the classifier; upstream's config has layer norms where the classifier it starts from has RMS
norms.

Upstream has released no weights: start from a classifier of your own with
``--cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE``.
"""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    type="mmvmamba.WindowedEncoderDecoder",
    backbone=dict(
        _delete_=True,
        type="mmvmamba.ShuffleMamba",
        arch="base",
        cls_token="none",  # noqa: S106 (no password)
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768, in_index=3),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

# bfloat16 has the range of float32, so nothing is scaled. The constructor adds to the recipe's rule for norms what the
# backbone wants without weight decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
)

train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(enable=False, base_batch_size=16)
