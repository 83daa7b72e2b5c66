"""The operators of the non-causal form: fake kernels, autograd, plain PyTorch fallback.

The compiled kernels are in ``csrc/cpu/ssd.cpp``, Triton's beside this file. ``mmvmamba::ssd_non_causal`` is
``ssd_state`` and ``ssd_read`` in one, whose backward makes one gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmvmamba.ops.scan_operator import ScanParts, declare
from mmvmamba.ops.ssd.heads import accumulation, by_group
from mmvmamba.ops.ssd.reference import ssd_non_causal_reference, ssd_read_reference, ssd_state_reference

_Optional = Tensor | None


def gradients_of_state(
    grad_state: Tensor, x: Tensor, weight: _Optional, b_in: Tensor, blocked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and b_in in the precision of the computation; `torch.Tensor.new_empty` (0) for none."""
    accumulate = accumulation(x.dtype)
    grad_state = grad_state.to(accumulate)
    inputs, grad_inputs = x.to(accumulate), ssd_read_reference(grad_state, b_in, blocked)
    weighted, dx, dweight = inputs, grad_inputs, grad_inputs.new_empty(0)
    if weight is not None:
        w = weight.to(accumulate).unsqueeze(-1)
        weighted, dx, dweight = inputs * w, grad_inputs * w, (grad_inputs * inputs).sum(-1)
    return dx, dweight, _gradient_of_projection(weighted, grad_state, b_in.shape[2], blocked)


def gradients_of_read(grad_out: Tensor, state: Tensor, c_out: Tensor, blocked: bool) -> tuple[Tensor, Tensor]:
    """Gradients of state and c_out in the precision of the computation."""
    accumulate = accumulation(state.dtype)
    dy = grad_out.to(accumulate)
    dstate = ssd_state_reference(dy, None, c_out, blocked)
    return dstate, _gradient_of_projection(dy, state.to(accumulate), c_out.shape[2], blocked)


def _gradient_of_projection(rows: Tensor, state: Tensor, groups: int, blocked: bool) -> Tensor:
    """Products of the rows (b, l, k, p) with a state (b, k, n, p), added up over the heads of a group: (b, l, g, n)."""
    turned = by_group(state.transpose(1, 2), groups, blocked).transpose(2, 3)
    return (by_group(rows, groups, blocked) @ turned).transpose(1, 2)


def _like(gradient: Tensor, value: _Optional) -> Tensor:
    """A gradient as an operator returns it: in the dtype of its tensor, contiguous, no alias; (0,) for none."""
    if value is None:
        return gradient.new_empty(0)
    return gradient.to(value.dtype).clone(memory_format=torch.contiguous_format)


def _state(x: Tensor, weight: _Optional, b_in: Tensor, blocked: bool) -> Tensor:
    return ssd_state_reference(x, weight, b_in, blocked).contiguous()


def _state_backward(
    grad_state: Tensor, x: Tensor, weight: _Optional, b_in: Tensor, blocked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, db = gradients_of_state(grad_state, x, weight, b_in, blocked)
    return _like(dx, x), _like(dweight, weight), _like(db, b_in)


def _read(state: Tensor, c_out: Tensor, blocked: bool, out_dtype: torch.dtype) -> Tensor:
    return ssd_read_reference(state, c_out, blocked).to(out_dtype).contiguous()


def _read_backward(grad_out: Tensor, state: Tensor, c_out: Tensor, blocked: bool) -> tuple[Tensor, Tensor]:
    dstate, dc = gradients_of_read(grad_out, state, c_out, blocked)
    return _like(dstate, state), _like(dc, c_out)


def _non_causal(
    x: Tensor, weight: _Optional, b_in: Tensor, c_out: Tensor, skip: _Optional, blocked: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out, state = ssd_non_causal_reference(x, weight, b_in, c_out, skip, blocked)
    return out.to(out_dtype).contiguous(), state.contiguous()


def _non_causal_backward(
    grad_out: Tensor, x: Tensor, weight: _Optional, b_in: Tensor, c_out: Tensor, skip: _Optional, blocked: bool,
    state: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    dstate, dc = gradients_of_read(grad_out, state, c_out, blocked)
    dx, dweight, db = gradients_of_state(dstate, x, weight, b_in, blocked)
    dskip = dx.new_empty(0)
    if skip is not None:
        dy = grad_out.to(dx.dtype)
        dx = dx + skip.unsqueeze(-1) * dy
        dskip = (dy * x.to(dx.dtype)).sum((0, 1, 3))
    return _like(dx, x), _like(dweight, weight), _like(db, b_in), _like(dc, c_out), _like(dskip, skip)


def fake_like(x: Tensor, value: _Optional) -> Tensor:
    """An empty tensor of the shape of ``value``; (0,) in the accumulation dtype of ``x`` for None."""
    return x.new_empty(0, dtype=accumulation(x.dtype)) if value is None else value.new_empty(value.shape)


def _state_shape(x: Tensor, b_in: Tensor) -> Tensor:
    b, _, k, p = x.shape
    return x.new_empty((b, k, b_in.shape[3], p), dtype=accumulation(x.dtype))


def _fake_state(x: Tensor, weight: _Optional, b_in: Tensor, blocked: bool) -> Tensor:
    return _state_shape(x, b_in)


def _fake_state_backward(
    grad_state: Tensor, x: Tensor, weight: _Optional, b_in: Tensor, blocked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_like(x, x), fake_like(x, weight), fake_like(x, b_in)


def _fake_read(state: Tensor, c_out: Tensor, blocked: bool, out_dtype: torch.dtype) -> Tensor:
    b, k, _, p = state.shape
    return state.new_empty((b, c_out.shape[1], k, p), dtype=out_dtype)


def _fake_read_backward(grad_out: Tensor, state: Tensor, c_out: Tensor, blocked: bool) -> tuple[Tensor, Tensor]:
    return fake_like(state, state), fake_like(state, c_out)


def _fake_non_causal(
    x: Tensor, weight: _Optional, b_in: Tensor, c_out: Tensor, skip: _Optional, blocked: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), _state_shape(x, b_in)


def _fake_non_causal_backward(
    grad_out: Tensor, x: Tensor, weight: _Optional, b_in: Tensor, c_out: Tensor, skip: _Optional, blocked: bool,
    state: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(fake_like(x, value) for value in (x, weight, b_in, c_out, skip))


def _keep(ctx: Any, grads: tuple[Tensor, ...], tensors: tuple[_Optional, ...]) -> tuple[_Optional, ...]:
    """Return the gradients that are wanted, None for the others."""
    needs = ctx.needs_input_grad[: len(tensors)]
    return tuple(
        grad if needed and value is not None else None
        for grad, needed, value in zip(grads, needs, tensors, strict=True)
    )


def _state_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.blocked = inputs
    ctx.save_for_backward(*tensors)


def _state_autograd(operator: Any, ctx: Any, grad_state: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = operator(grad_state, *tensors, ctx.blocked)
    return (*_keep(ctx, grads, tensors), None)


def _read_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.blocked, _out_dtype = inputs
    ctx.save_for_backward(*tensors)


def _read_autograd(operator: Any, ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = operator(grad_out, *tensors, ctx.blocked)
    return (*_keep(ctx, grads, tensors), None, None)


def _non_causal_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.blocked, _out_dtype = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _non_causal_autograd(operator: Any, ctx: Any, grad_out: _Optional, _grad_state: None) -> tuple[Any, ...]:
    *tensors, state = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 7
    grads = operator(grad_out, *tensors, ctx.blocked, state)
    return (*_keep(ctx, grads, tuple(tensors)), None, None)


# The weights are not among the streams: they are few, and autocast would save nothing by cutting them.
_PARTS = {
    "state": ScanParts(
        forward=_state,
        backward=_state_backward,
        fake_forward=_fake_state,
        fake_backward=_fake_state_backward,
        setup_context=_state_context,
        autograd=_state_autograd,
        gradients=1,
        streams=(0, 2),
        package="ssd",
        prefix="state_",
        plain_is_good=True,
    ),
    "read": ScanParts(
        forward=_read,
        backward=_read_backward,
        fake_forward=_fake_read,
        fake_backward=_fake_read_backward,
        setup_context=_read_context,
        autograd=_read_autograd,
        gradients=1,
        streams=(1,),
        package="ssd",
        prefix="read_",
        plain_is_good=True,
    ),
    "non_causal": ScanParts(
        forward=_non_causal,
        backward=_non_causal_backward,
        fake_forward=_fake_non_causal,
        fake_backward=_fake_non_causal_backward,
        setup_context=_non_causal_context,
        autograd=_non_causal_autograd,
        gradients=1,
        streams=(0, 2, 3),
        package="ssd",
        prefix="non_causal_",
        plain_is_good=True,
    ),
}
for _name, _parts in _PARTS.items():
    declare(f"ssd_{_name}", _parts)
