"""VMamba-T [s1l8], 300 epochs on ImageNet-1k: mmpretrain's Swin recipe, 8 GPUs x 128 images."""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        out_indices=(3,),
        drop_path_rate=0.2,
    ),
)

# Norms and biases have no decay in the base; A_logs is a matrix and needs its own rule.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={"A_logs": dict(decay_mult=0.0), "dt_projs_bias": dict(decay_mult=0.0)})
)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
