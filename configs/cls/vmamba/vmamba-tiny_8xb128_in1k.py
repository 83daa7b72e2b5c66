"""VMamba-T [s1l8], 300 epochs on ImageNet-1k: mmpretrain's Swin recipe, 8 GPUs x 128 images."""

_base_ = ["mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py", "../../_base_/ssm_no_decay.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        out_indices=(3,),
        drop_path_rate=0.2,
    ),
)

# Norms and biases have no decay in the base; A_logs and dt_projs_bias are matrices and need their own rule.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.ssm_no_decay))

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
