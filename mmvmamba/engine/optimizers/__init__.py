"""Optimizer wrappers, one class per file."""

from mmvmamba.engine.optimizers.bfloat16_optim_wrapper import Bfloat16OptimWrapper

__all__ = ["Bfloat16OptimWrapper"]
