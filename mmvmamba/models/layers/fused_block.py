"""The part of a block that looks at one pixel at a time, from the merged scan to the output, in one walk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmvmamba.models.layers.linear import Linear
from mmvmamba.models.layers.mlp import Mlp, chunk_rows
from mmvmamba.models.layers.norm import LayerNorm
from mmvmamba.models.layers.observers import is_unobserved
from mmvmamba.models.layers.onednn import inference_dtype, multiply
from mmvmamba.models.layers.ss2d import SS2D


def fused_tail_dtype(x: Tensor, op: nn.Module, norm: nn.Module, mlp: nn.Module) -> torch.dtype | None:
    """Return the type in which `fused_tail` computes for a block input ``x`` (b, h, w, c), None if it must not run.

    It leaves the modules' ``forward`` out, so they must be the plain ones, without hooks and active dropout, and no
    gradient may be asked for.
    """
    if torch.is_grad_enabled() or type(mlp) is not Mlp or not isinstance(op, SS2D) or not mlp.can_fuse(x):
        return None
    fits = (
        type(op).forward is SS2D.forward
        and type(op).project is SS2D.project
        and type(op.out_norm) is type(norm) is LayerNorm
        and type(op.out_act) is nn.Identity
        and type(op.out_proj) is Linear
        and (op.dropout.p == 0.0 or not op.dropout.training)
        and is_unobserved(op, op.out_norm, op.out_act, op.out_proj, op.dropout, norm, mlp)
    )
    if not fits:
        return None
    return inference_dtype(x, op.out_proj.weight, op.out_proj.bias, *mlp.parameters())


def fused_tail(
    x: Tensor, merged: Tensor, gate: Tensor | None, op: SS2D, norm: LayerNorm, mlp: Mlp, dtype: torch.dtype
) -> Tensor:
    """Return ``r + mlp(norm(r))`` with ``r = x + op.project(merged, gate)``.

    The pixels are taken in chunks, of which everything but input and output stays in the cache: from the scan to the
    end of the block no map is written but the result.

    Args:
        x: The block's input (b, h, w, c), to which the two branches are added.
        merged: The merged scans (b, h, w, d), see ``SS2D.mix``.
        gate: What multiplies them after their norm (b, h, w, d), or None.
        op: The layer whose projection follows.
        norm: The norm before the perceptron.
        mlp: The perceptron.
        dtype: The type of the products, from `fused_tail_dtype`.

    Returns:
        The block's output (b, h, w, c).
    """
    weight = op.out_proj.weight.to(dtype)
    bias = None if op.out_proj.bias is None else op.out_proj.bias.to(dtype)
    w1, b1, w2, b2 = mlp.narrow_parameters(dtype)
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, dtype))
    size = chunk_rows(w1.shape[0])
    pixels = [t.reshape(-1, t.shape[-1]).split(size) for t in (x, merged, out)]
    gates = [None] * len(pixels[0]) if gate is None else gate.reshape(-1, gate.shape[-1]).split(size)
    for rows, scanned, into, factor in zip(*pixels, gates, strict=True):
        y = op.out_norm(scanned).to(dtype)
        if factor is not None:
            y = (y * factor).to(dtype)
        torch.add(rows, multiply(y, weight, bias), out=into)
        into.add_(multiply(multiply(norm(into).to(dtype), w1, b1, gelu=True), w2, b2))
    return out
