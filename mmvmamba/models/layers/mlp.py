"""Two-layer perceptrons applied to every pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.models.layers.activation import Activation, build_activation
from mmvmamba.models.layers.checks import check_hidden
from mmvmamba.models.layers.linear import Linear
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.onednn import (
    inference_dtype,
    is_traced,
    matmul,
    multiply,
    serves_float32,
    serves_gradient,
    weight_gradient,
    without_autocast,
    without_repeats,
)

# Hidden values of one step of the chunked passes: 2 MiB of float32, which the next step finds in the cache and at the
# same address. Fewer rows than the second number leave the product of the weights inefficient (docs/cpu_speed.md).
_CHUNK_VALUES, _MIN_CHUNK = 2**19, 256
# Multiplications of one linear map below which the perceptron is not fused.
_MIN_WORK = 2**20


def chunk_rows(hidden: int) -> int:
    """Return how many pixels of ``hidden`` channels a chunked pass takes at a time, the same for every map size."""
    return max(_CHUNK_VALUES // hidden // 64 * 64, _MIN_CHUNK) * torch.get_num_threads()


class Mlp(nn.Module):
    """Linear, activation, dropout, linear, dropout.

    With a GELU and no active dropout, a CPU walks over the pixels in chunks, so that the wide map between the two
    linear maps stays in its cache and, while training, only its values before the activation are kept.

    Args:
        channels: Channels of input and output.
        hidden: Channels between the two linear maps.
        act: Name of the activation.
        dropout: Dropout probability after either linear map.

    Raises:
        ConfigError: If there are no hidden channels.
    """

    def __init__(self, channels: int, hidden: int, act: Activation = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        check_hidden("Mlp", hidden)
        self.fc1 = Linear(channels, hidden)
        self.act = build_activation(act)
        self.fc2 = Linear(hidden, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., c) to (..., c)."""
        if self.can_fuse(x):
            parameters = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            if torch.is_grad_enabled():
                if serves_float32(x, *parameters):
                    return _GeluMlp.apply(x.reshape(-1, x.shape[-1]), *parameters)[0].view(x.shape)
            elif (dtype := inference_dtype(x, *parameters)) is not None:
                return self._in_chunks(x.reshape(-1, x.shape[-1]), dtype).view(x.shape)
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))

    def can_fuse(self, x: Tensor) -> bool:
        """Return whether two products with a GELU between are all there is, and worth it for ``x`` (..., c)."""
        return (
            not is_traced()
            and type(self.fc1) is type(self.fc2) is Linear
            and type(self.act) is nn.GELU
            and self.act.approximate == "none"
            and (self.drop.p == 0.0 or not self.drop.training)
            and x.shape[-1] == self.fc1.in_features == self.fc2.out_features
            and x.numel() * self.fc1.out_features >= _MIN_WORK
            and is_unobserved(self.fc1, self.act, self.fc2, self.drop)
        )

    def narrow_parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return weight and bias of both linear maps in ``dtype``, themselves if they have it."""
        w1, b1, w2, b2 = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return w1.to(dtype), None if b1 is None else b1.to(dtype), w2.to(dtype), None if b2 is None else b2.to(dtype)

    def _in_chunks(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        w1, b1, w2, b2 = self.narrow_parameters(dtype)
        size = chunk_rows(w1.shape[0])
        if x.shape[0] <= size:
            return multiply(multiply(x.to(dtype), w1, b1, gelu=True), w2, b2)
        out = x.new_empty(x.shape, dtype=dtype)
        for rows, into in zip(x.split(size), out.split(size), strict=True):
            into.copy_(multiply(multiply(rows.to(dtype), w1, b1, gelu=True), w2, b2))
        return out


class _GeluMlp(torch.autograd.Function):
    """Linear, GELU, linear of rows (m, c), twice differentiable.

    Of the hidden values only those before the GELU are kept, and of the inputs what the wanted gradients need. The
    former are a second output, so that second derivatives find their way through them; no caller uses it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden = multiply(x, w1, b1)
        of_x, of_w1, of_b1, of_w2, _ = ctx.needs_input_grad
        inner = of_x or of_w1 or of_b1
        ctx.save_for_backward(
            x if of_w1 else None, w1 if of_x else None, w2 if inner else None, hidden if inner or of_w2 else None
        )
        ctx.set_materialize_grads(False)
        size = chunk_rows(w1.shape[0])
        if x.shape[0] <= size:
            return multiply(F.gelu(hidden), w2, b2), hidden
        out = x.new_empty(x.shape[0], w2.shape[0])
        for rows, into in zip(hidden.split(size), out.split(size), strict=True):
            into.copy_(multiply(F.gelu(rows), w2, b2))
        return out, hidden

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, grad_hidden = grads
        x, w1, w2, hidden = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if grad is None or grad_hidden is not None or not serves_gradient(grad):
            return _plain_gradients(grad, grad_hidden, (x, w1, w2, hidden), needed)
        grad = without_repeats(grad)
        grad_x = of_w1 = of_b1 = of_w2 = None
        if needed[0]:
            grad_x = grad.new_empty(grad.shape[0], w1.shape[1])
        for g, h, rows in _chunks(grad, hidden) if any(needed[:4]) else ():
            if needed[3]:
                of_w2 = _accumulate(of_w2, weight_gradient(g, F.gelu(h)))
            if not any(needed[:3]):
                continue
            of_h = matmul(g, w2)
            torch.ops.aten.gelu_backward.grad_input(of_h, h, grad_input=of_h)
            if needed[1]:
                of_w1 = _accumulate(of_w1, weight_gradient(of_h, x[rows]))
            if needed[2]:
                of_b1 = _accumulate(of_b1, of_h.sum(0))
            if grad_x is not None:
                grad_x[rows] = matmul(of_h, w1)
        return grad_x, of_w1, of_b1, of_w2, grad.sum(0) if needed[4] else None


def _chunks(grad: Tensor, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield the rows of both (m, c) and (m, hidden), and which they are, a chunk at a time."""
    size = chunk_rows(hidden.shape[1])
    for start in range(0, grad.shape[0], size):
        rows = slice(start, start + size)
        yield grad[rows], hidden[rows], rows


def _accumulate(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)


def _plain_gradients(
    grad: Tensor | None, grad_hidden: Tensor | None, kept: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients by PyTorch's operators, which can be differentiated again.

    Either output's gradient may be None for zero. ``kept`` are x, w1, w2 and the hidden values, None where not needed.
    """
    x, w1, w2, hidden = kept
    of_h = grad_hidden
    if grad is not None and any(needed[:3]):
        through_gelu = torch.ops.aten.gelu_backward(grad @ w2, hidden)
        of_h = through_gelu if of_h is None else of_h + through_gelu
    return (
        of_h @ w1 if needed[0] and of_h is not None else None,
        of_h.t() @ x if needed[1] and of_h is not None else None,
        of_h.sum(0) if needed[2] and of_h is not None else None,
        grad.t() @ F.gelu(hidden) if needed[3] and grad is not None else None,
        grad.sum(0) if needed[4] and grad is not None else None,
    )


class GatedMlp(nn.Module):
    """The first linear map is twice as wide; its first half is multiplied by the activated second half.

    Args:
        channels: Channels of input and output.
        hidden: Channels of either half.
        act: Name of the activation of the gate.
        dropout: Dropout probability after the last linear map.

    Raises:
        ConfigError: If there are no hidden channels.
    """

    def __init__(self, channels: int, hidden: int, act: Activation = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        check_hidden("GatedMlp", hidden)
        self.fc1 = Linear(channels, 2 * hidden)
        self.act = build_activation(act)
        self.fc2 = Linear(hidden, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., c) to (..., c)."""
        x, z = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(x * self.act(z)))
