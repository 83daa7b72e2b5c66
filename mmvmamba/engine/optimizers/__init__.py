"""Optimizer wrappers and what builds them, one class per file."""

from mmvmamba.engine.optimizers.bfloat16_optim_wrapper import Bfloat16OptimWrapper
from mmvmamba.engine.optimizers.ssm_optim_wrapper_constructor import SSMOptimWrapperConstructor

__all__ = ["Bfloat16OptimWrapper", "SSMOptimWrapperConstructor"]
