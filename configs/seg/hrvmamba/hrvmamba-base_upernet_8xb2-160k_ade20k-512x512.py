"""UperNet with HRVMamba-B, 160k iterations on ADE20K at 512x512: mmseg's Swin recipe, 8 GPUs x 2 images.

The official ImageNet weights, and those of this segmentor, are in Google Drive, as files that a browser gets. Name the
former in ``model.backbone.init_cfg``, or the latter in ``load_from``, once they are on your disk:
https://drive.google.com/file/d/1jbXjvCBdjgraeEaJrDjD2wStpxJtCEuy/view (ImageNet)
https://drive.google.com/file/d/1O288Y_VhuWRtTXO2WpTbGkEwEn2raik-/view (UPerNet)
"""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.HRVMamba", arch="base", drop_path_rate=0.15),
    decode_head=dict(in_channels=[128, 256, 512, 2048]),
    auxiliary_head=dict(in_channels=512),
)

# bfloat16 has the range of float32, so nothing is scaled. The constructor adds to the recipe's rule for norms what the
# backbone wants without weight decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=dict(enabled=False),
    constructor="mmvmamba.SSMOptimWrapperConstructor",
)

auto_scale_lr = dict(enable=False, base_batch_size=16)
