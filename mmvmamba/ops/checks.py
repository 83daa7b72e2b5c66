"""Argument checks shared by the operators; every failure is an `OpInputError` that names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmvmamba.errors import BackendError, OpInputError

LOW_PRECISION = (torch.float16, torch.bfloat16)
STREAM_DTYPES = (torch.float32, *LOW_PRECISION)
OUT_DTYPES = (torch.float32, torch.float64, *LOW_PRECISION)


def fail(op: str, argument: str, found: object, expected: object, advice: str) -> NoReturn:
    """Raise the `OpInputError` of one bad argument."""
    raise OpInputError(f"{op}: argument '{argument}' {found}; expected {expected}. {advice}")


def check_tensor(op: str, argument: str, value: object) -> None:
    """Refuse anything that is not a dense tensor."""
    if not isinstance(value, Tensor):
        fail(op, argument, f"is a {type(value).__name__}", "a torch.Tensor", "Convert it with torch.as_tensor.")
    elif value.layout != torch.strided:
        fail(op, argument, f"has layout {value.layout}", "a dense tensor (torch.strided)", "Call .to_dense() first.")


def check_floating(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse anything that is not a dense tensor of a dtype that the convolutions have."""
    for name, value in tensors.items():
        check_tensor(op, name, value)
        if value.dtype not in OUT_DTYPES:
            expected = "one of " + ", ".join(map(str, OUT_DTYPES))
            fail(op, name, f"has dtype {value.dtype}", expected, "Cast it with .to().")


def check_same_dtype(op: str, first: str, reference: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Refuse mixed dtypes, as PyTorch's convolutions do; autocast has done its work before."""
    for name, value in others.items():
        if value is not None and value.dtype != reference.dtype:
            fail(op, name, f"has dtype {value.dtype}", f"{reference.dtype}, as '{first}' has",
                 f"Cast it with .to({reference.dtype}), or run under torch.autocast.")  # fmt: skip


def to_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments of a convolution in the dtype of autocast, where it is on; float64 stays."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(value: Tensor) -> Tensor:
        return value if value.dtype == torch.float64 else value.to(dtype)

    return cast(x), cast(weight), None if bias is None else cast(bias)


def check_flag(op: str, argument: str, value: object) -> None:
    """Refuse anything that is not True or False."""
    if not isinstance(value, bool):
        fail(op, argument, f"is {value!r}", "True or False", "Pass a bool.")


def check_rank(op: str, argument: str, value: Tensor, names: str) -> None:
    """Refuse a tensor whose number of dimensions is not that of ``names``, e.g. ``"(b, d, l)"``."""
    rank = names.count(",") + 1 - names.count(",)")
    if value.dim() != rank:
        found = f"has {value.dim()} dimensions, shape {tuple(value.shape)}"
        fail(op, argument, found, f"{rank} dimensions {names}", "Reshape it to that layout.")


def check_shape(op: str, argument: str, value: Tensor, names: str, expected: tuple[int, ...]) -> None:
    """Refuse a tensor whose shape is not ``expected``; ``names`` are the axes in words."""
    if value.dim() != len(expected) or any(a != b for a, b in zip(value.shape, expected, strict=True)):
        found = f"has shape {tuple(value.shape)}"
        fail(op, argument, found, f"{names} = {tuple(expected)}", "Check it against the shapes of the other arguments.")


def check_dtypes(op: str, streams: Mapping[str, Tensor], parameters: Mapping[str, Tensor | None]) -> torch.dtype:
    """Check the dtype policy and return the dtype the state is kept in.

    Args:
        op: Name of the operator, for messages.
        streams: The per-position tensors: any mix of float16, bfloat16 and float32, or all float64.
        parameters: The per-channel tensors: float32, or float64 when the streams are float64.
    """
    first = next(iter(streams))
    double = streams[first].dtype == torch.float64
    allowed = (torch.float64,) if double else STREAM_DTYPES
    for name, value in streams.items():
        if value.dtype not in allowed:
            choices = ", ".join(str(dtype) for dtype in allowed)
            fail(op, name, f"has dtype {value.dtype}", f"one of {choices} (as '{first}' is {streams[first].dtype})",
                 "Cast it with .to(); float64 works only when every argument is float64.")  # fmt: skip
    accumulate = torch.float64 if double else torch.float32
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype != accumulate:
            fail(op, name, f"has dtype {parameter.dtype}", f"{accumulate}, the precision of the state",
                 f"Cast it with .to({accumulate}).")  # fmt: skip
    return accumulate


def check_devices(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Refuse tensors that live on different devices."""
    first, reference = next((name, value) for name, value in tensors.items() if value is not None)
    for name, value in tensors.items():
        if value is not None and value.device != reference.device:
            fail(op, name, f"is on {value.device}", f"{reference.device}, where '{first}' is",
                 f"Move it with .to('{reference.device}').")  # fmt: skip


def carry_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether forward-mode differentiation runs through one of the tensors.

    The dispatcher operators know reverse mode only, and would return a zero tangent without a word.
    """
    if torch.compiler.is_compiling():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def refuse_forward_mode(op: str, backend: str) -> None:
    """Raise the `BackendError` of a dispatcher operator asked for forward-mode derivatives."""
    raise BackendError(
        f"{op}: backend {backend!r} was asked for by name and has no forward-mode derivative; leave the backend out or "
        "pass backend='reference'"
    )


def check_out_dtype(op: str, out_dtype: torch.dtype | None, stream: Tensor) -> torch.dtype:
    """Return the dtype of the output, or refuse one that is not floating point.

    Args:
        op: Name of the operator, for messages.
        out_dtype: What the caller asked for, or None.
        stream: The per-position tensor whose dtype is the default.
    """
    if out_dtype is None:
        return _default_out_dtype(stream)
    if out_dtype not in OUT_DTYPES:
        fail(op, "out_dtype", f"is {out_dtype!r}", "None or one of " + ", ".join(map(str, OUT_DTYPES)),
             "Leave it out to get the dtype of the input.")  # fmt: skip
    return out_dtype


def _default_out_dtype(stream: Tensor) -> torch.dtype:
    """Return the output's dtype where the caller gave none.

    Decided here, above the dispatcher, whose operators always name a dtype: so eager calls and traces agree.
    """
    if stream.device.type != "cuda" or stream.dtype == torch.float64 or not torch.is_autocast_enabled("cuda"):
        return stream.dtype
    low = torch.get_autocast_dtype("cuda")
    # A sum over routes can be beyond float16, which bfloat16 cannot suffer.
    return torch.float32 if low == torch.float16 else low
