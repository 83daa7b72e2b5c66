"""Calls of other projects' CUDA kernels, where they are installed; arguments as `upstream_path.selective_scan` has.

Facts used: names and order of the arguments of ``selective_scan_cuda_oflex`` (VMamba, kernels/selective_scan) and of
``mamba_ssm.ops.selective_scan_interface.selective_scan_fn`` (state-spaces/mamba). Neither package is needed here.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


class _Oflex(torch.autograd.Function):
    """VMamba's kernel: activations in one dtype, A, D, bias and output in float32."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
    ) -> Tensor:
        module = importlib.import_module("selective_scan_cuda_oflex")
        # softplus, one row for a block, float32 output
        out, states, *_ = module.fwd(u, delta, A, B, C, D, delta_bias, True, 1, True)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        module = importlib.import_module("selective_scan_cuda_oflex")
        *inputs, states = ctx.saved_tensors
        grads = module.bwd(*inputs, grad_out.contiguous(), states, True, 1)
        return tuple(grad.to(value.dtype) for grad, value in zip(grads, inputs, strict=False))


def oflex(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """Run VMamba's kernel.

    Args:
        u: (b, d, l).
        delta: (b, d, l), before bias and softplus.
        A: (d, n).
        B: (b, g, n, l).
        C: (b, g, n, l).
        D: (d,).
        delta_bias: (d,).

    Returns:
        (b, d, l), float32.
    """
    return _Oflex.apply(u.contiguous(), delta.contiguous(), A, B.contiguous(), C.contiguous(), D, delta_bias)


def mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """Run Mamba's kernel; arguments as in `oflex`, the output has the dtype of ``u``."""
    function = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return function(u, delta, A, B, C, D, z=None, delta_bias=delta_bias, delta_softplus=True)
