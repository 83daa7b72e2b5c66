# Shard parameters, gradients and optimizer state over the GPUs. A config takes it as one more base, beside that of its
# model: docs/distributed.md.
runner_type = "FlexibleRunner"
strategy = dict(
    type="mmvmamba.FSDPStrategy",
    model_wrapper=dict(
        type="MMFullyShardedDataParallel",
        auto_wrap_policy="mmvmamba.wrap_blocks",
        use_orig_params=True,  # optimizer groups by name (no weight decay), and frozen stages
    ),
    state_dict_cfg="full",  # one file, which every tool reads and any number of GPUs resumes
)
