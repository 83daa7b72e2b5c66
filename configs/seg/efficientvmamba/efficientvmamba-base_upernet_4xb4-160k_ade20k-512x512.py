"""UperNet with EfficientVMamba-B, 160k iterations on ADE20K at 512x512: mmseg's Swin recipe, 4 GPUs x 4 images.

The paper has a result, upstream no config: this is our recipe for VMamba, with the variant's own stochastic depth.
"""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

# No address of the ImageNet weights is known but https://huggingface.co/TerryPei/EfficientVMamba-Base: download the
# file and name it, --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
model = dict(backbone=dict(_delete_=True, type="mmvmamba.EfficientVMamba", arch="base"))

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
