"""UperNet with MSVMamba-T, 160k iterations on ADE20K at 512x512: mmseg's Swin recipe, 4 GPUs x 4 images."""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

# The official ImageNet weights (82.8 % top-1 as published) are vssm_tiny_ms_e300.pth in a folder of Google Drive that
# the README of https://github.com/YuHengsss/MSVMamba links; files in it have no address to be named here. Download it
# and pass --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
model = dict(backbone=dict(_delete_=True, type="mmvmamba.MSVMamba", arch="v1-tiny"))

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
