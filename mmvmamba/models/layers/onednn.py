"""When and how linear maps go to oneDNN instead of ``F.linear``.

PyTorch sends float32 matrix products on a CPU to MKL, which on processors that are not Intel's uses less than half
of what they can do. Its own oneDNN build reaches nearly all of it and applies a GELU in registers; the operator behind
that (``mkldnn::_linear_pointwise``, made for compiled models) has no gradient, which `linear` adds.

It is used in eager mode on an x86 CPU only, for dense float32 tensors (or bfloat16 ones where the processor multiplies
them and no gradient is asked for), when nothing else interprets the call: no trace, compilation or export, no dispatch
mode, no ``torch.func`` transform, no forward-mode differentiation. Everywhere else, where the operator does not
exist, and for maps too small to repay its overhead, the call is ``F.linear`` and nothing else.

The weights are packed anew in every call: a packed copy kept between calls cannot know that ``weight.data`` was
written to, as MMEngine's averaging of weights does, and the packing costs a few percent (docs/cpu_speed.md).
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

_EXISTS = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_HAS_BF16 = (
    _EXISTS
    and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
)
# Multiplications below which the operator's overhead of about 9 us decides (docs/cpu_speed.md).
_MIN_WORK = 2**20
_PLAIN_TYPES = (Tensor, nn.Parameter)

_enabled = True


@contextlib.contextmanager
def use_onednn_linear(enabled: bool) -> Iterator[None]:
    """Allow or forbid oneDNN for the linear maps, perceptrons and convolutions of this package in the ``with`` block.

    The setting belongs to the process, not to a thread. It is meant for measuring; ``torch.backends.mkldnn.flags``
    turns off all oneDNN of PyTorch and is respected, too.

    Args:
        enabled: False sends everything to ``torch.nn.functional``.
    """
    global _enabled
    before = _enabled
    _enabled = enabled
    try:
        yield
    finally:
        _enabled = before


def is_traced() -> bool:
    """Return whether a compilation, an export or ``torch.jit.trace`` is recording the calls made now.

    To be asked before any comparison of sizes, which a trace would take over as a condition on its inputs: an export
    with a dynamic batch refuses those, and a compiled model compiles again for every side of them.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_plain_eager() -> bool:
    """Return whether operators called now run at once and as they are, on a CPU with the oneDNN operator."""
    return (
        not is_traced()
        and _EXISTS
        and _enabled
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_mkldnn_enabled()
    )


def all_dense(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Return whether the tensors that are not None are ordinary, strided, on the CPU and of type ``dtype``."""
    for t in tensors:
        if t is not None and not (
            type(t) in _PLAIN_TYPES and t.dtype is dtype and t.device.type == "cpu" and t.layout is torch.strided
        ):
            return False
    return True


def serves_float32(*tensors: Tensor | None) -> bool:
    """Return whether oneDNN can take float32 maps of these tensors now, with or without gradients."""
    return is_plain_eager() and all_dense(torch.float32, *tensors) and not torch.is_autocast_enabled("cpu")


def inference_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype | None:
    """Return the type in which oneDNN would multiply ``x`` with ``parameters`` now, or None if it must not.

    None also where a gradient might be asked for.
    """
    if torch.is_grad_enabled() or not is_plain_eager():
        return None
    if torch.is_autocast_enabled("cpu"):
        wanted = torch.get_autocast_dtype("cpu")
        castable = all(
            all_dense(torch.float32, t) or all_dense(torch.bfloat16, t) for t in (x, *parameters) if t is not None
        )
        return wanted if wanted is torch.bfloat16 and _HAS_BF16 and castable else None
    if x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and _HAS_BF16):
        return x.dtype if all_dense(x.dtype, x, *parameters) else None
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, which is ``F.linear``, the fastest way that applies.

    Args:
        x: (..., c).
        weight: (c', c).
        bias: (c',) or None.

    Returns:
        (..., c').

    Raises:
        RuntimeError: What ``F.linear`` raises for the same arguments.
    """
    if (
        not is_traced()
        and weight.ndim == 2
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.numel() * weight.shape[0] >= _MIN_WORK
        and serves_float32(x, weight, bias)
    ):
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            out = _Linear.apply(rows, weight, bias)
        else:
            out = multiply(rows, weight, bias)
        return out.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Call the operator: (m, c) times (c', c) gives (m, c'), with bias (c',) and an exact GELU if asked for.

    The operands may be strided in any way. There is no gradient: callers are autograd functions or run without.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of (m, c) and (c, n) without a gradient, by oneDNN unless the product is small."""
    if a.shape[0] * b.numel() < _MIN_WORK:
        return a @ b
    return multiply(a, b.t())


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return ``grad.T @ x`` (c', c) of ``grad`` (m, c') and ``x`` (m, c) without a gradient.

    The operator copies its first operand in order when that is transposed, so the narrower one goes first unless the
    result, then transposed, is the larger copy. Rows that lie apart in memory, such as some channels of a wider map,
    would be multiplied a thousand times more slowly, so they are put together.
    """
    grad, x = grad.contiguous(), x.contiguous()
    (rows, width), inner = grad.shape, x.shape[1]
    if rows * (width - inner) > 2 * width * inner:
        return matmul(x.t(), grad).t().contiguous()
    return matmul(grad.t(), x)


def serves_gradient(grad: Tensor) -> bool:
    """Return whether a backward pass may use the functions above: ``grad`` is ordinary and needs no derivative."""
    # The vmap behind torch.autograd.grad(is_grads_batched=True) is older than torch.func and not one of its transforms.
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return not torch.is_grad_enabled() and not batched and serves_float32(grad)


def without_repeats(grad: Tensor) -> Tensor:
    """Return a gradient with memory of its own for every value.

    That of a sum is one value everywhere, with strides of 0, which oneDNN multiplies hundreds of times more slowly.
    """
    return grad.contiguous() if 0 in grad.stride() else grad


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``backward`` of a float32 autograd function compute in float32 also when it is called under autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return backward(ctx, *grads)
        with torch.autocast("cpu", enabled=False):
            return backward(ctx, *grads)

    return run


class _Linear(torch.autograd.Function):
    """`linear` of rows with gradients by oneDNN, twice differentiable.

    Kept is what the wanted gradients need, no more: fine-tuning with frozen weights lives on the difference.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return multiply(x, weight, bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        # With create_graph the gradients need derivatives themselves, which only PyTorch's own operators have.
        fast = serves_gradient(grad)
        grad = without_repeats(grad) if fast else grad
        if of_x:
            grad_x = matmul(grad, weight) if fast else grad @ weight
        if of_weight:
            grad_weight = weight_gradient(grad, x) if fast else grad.t() @ x
        return grad_x, grad_weight, grad.sum(0) if of_bias else None
