# Shard parameters, gradients and optimizer state over the GPUs (docs/distributed.md). A config takes it as one more base:
#     _base_ = ["../vmamba/mask-rcnn_vmamba-base-s2l15_fpn_1x_coco.py", "../_base_/fsdp.py"]
runner_type = "FlexibleRunner"
strategy = dict(
    type="mmvmamba.FSDPStrategy",
    model_wrapper=dict(
        type="MMFullyShardedDataParallel",
        auto_wrap_policy="mmvmamba.wrap_vss_blocks",
        use_orig_params=True,  # optimizer groups by name (no weight decay), and frozen stages
    ),
    state_dict_cfg="full",  # one file, which every tool reads and any number of GPUs resumes
)
