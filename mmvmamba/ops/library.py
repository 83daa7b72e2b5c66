"""Schemas of all ``mmvmamba::`` operators, and what every scan operator is made of.

They are declared in Python, so they exist without a build: kernels of ``csrc/`` attach themselves to these names
when the library is loaded, and where none is attached the plain PyTorch kernel registered by
`register_fallback` runs. Kernels of the stable ABI carry no schema of their own, so nothing compares the two: whoever
changes a schema changes ``csrc/cpu/<op>.cpp`` in the same commit, and in a source tree the loader refuses a library
built from other sources (`mmvmamba.ops.extension`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmvmamba.errors import BackendError

CHUNK = 32
"""Positions between two saved states; ``kChunk`` of ``csrc/cpu/kernels.h``."""

_LIBRARY = torch.library.Library("mmvmamba", "FRAGMENT")

_SCAN_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"
_SCAN2D_INPUTS = "Tensor x, Tensor projections, Tensor dt_weight, Tensor? dt_bias, Tensor A, Tensor? D"
_SSD_INPUTS = "Tensor x, Tensor? weight, Tensor b_in, Tensor c_out, Tensor? skip"
_CAUSAL_INPUTS = (
    "Tensor x, Tensor dt, Tensor decay, Tensor b_in, Tensor c_out, Tensor? skip, Tensor? dt_bias, Tensor? initial_state"
)
_ROUTES = "int[] orders, Tensor? permutation"

SCAN_SCHEMAS = (
    f"selective_scan({_SCAN_INPUTS}, bool delta_softplus, ScalarType out_dtype, bool save_carries)"
    " -> (Tensor out, Tensor last_state, Tensor carries)",
    f"selective_scan_backward(Tensor grad_out, Tensor? grad_last_state, {_SCAN_INPUTS}, bool delta_softplus,"
    " Tensor carries) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"scan2d({_SCAN2D_INPUTS}, {_ROUTES}, bool delta_softplus, ScalarType out_dtype, bool save_carries)"
    " -> (Tensor out, Tensor carries)",
    f"scan2d_backward(Tensor grad_out, {_SCAN2D_INPUTS}, {_ROUTES}, bool delta_softplus, Tensor carries)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
SSD_SCHEMAS = (
    # blocked: head j uses group j // (k / g), else j % g.
    "ssd_state(Tensor x, Tensor? weight, Tensor b_in, bool blocked) -> Tensor",
    "ssd_state_backward(Tensor grad_state, Tensor x, Tensor? weight, Tensor b_in, bool blocked)"
    " -> (Tensor, Tensor, Tensor)",
    "ssd_read(Tensor state, Tensor c_out, bool blocked, ScalarType out_dtype) -> Tensor",
    "ssd_read_backward(Tensor grad_out, Tensor state, Tensor c_out, bool blocked) -> (Tensor, Tensor)",
    f"ssd_non_causal({_SSD_INPUTS}, bool blocked, ScalarType out_dtype) -> (Tensor out, Tensor state)",
    f"ssd_non_causal_backward(Tensor grad_out, {_SSD_INPUTS}, bool blocked, Tensor state)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"ssd({_CAUSAL_INPUTS}, bool dt_softplus, bool blocked, ScalarType out_dtype, bool save_carries)"
    " -> (Tensor out, Tensor last_state, Tensor carries)",
    f"ssd_backward(Tensor? grad_out, Tensor? grad_last_state, {_CAUSAL_INPUTS}, bool dt_softplus, bool blocked,"
    " Tensor carries) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
TWINS = ("", "_triton")
"""A scan has one operator for the kernels of ``csrc/`` and one for Triton's, alike in all but the name's end: a trace
keeps the backend it was made with, and a forward is always followed by its own backward."""


def twin(name: str, suffix: str) -> str:
    """``("scan2d_backward", "_triton")`` -> ``"scan2d_triton_backward"``."""
    stem = name.removesuffix("_backward")
    return stem + suffix + name[len(stem) :]


SCHEMAS = (
    *(
        twin(name, suffix) + "(" + signature
        for suffix in TWINS
        for name, signature in (schema.split("(", 1) for schema in SCAN_SCHEMAS + SSD_SCHEMAS)
    ),
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor",
    "depthwise_conv2d_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, int activation, bool need_x,"
    " bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    # reverse: 0 or 1 for each direction.
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, int[] reverse, int activation) -> Tensor",
    "causal_conv1d_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, int[] reverse, int activation,"
    " bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    # The instruction set of the compiled CPU kernels: default, neon, avx2 or avx512. Exists only where they are loaded.
    "cpu_capability() -> str",
)

for _schema in SCHEMAS:
    _LIBRARY.define(_schema)


def register_fallback(name: str, kernel: Callable[..., object]) -> None:
    """Make ``kernel`` the implementation of ``mmvmamba::<name>`` wherever no compiled kernel is attached."""
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")


def register_autocast(
    name: str, cast: Callable[[tuple[Any, ...], torch.dtype], tuple[Any, ...]], device_type: str = "cuda"
) -> None:
    """Make ``cast`` the autocast rule of ``mmvmamba::<name>`` on a device type.

    Args:
        name: Name of the operator.
        cast: Takes the arguments and the dtype of autocast and returns the arguments to call the operator with.
        device_type: ``"cuda"``; the operators cast nothing on a CPU.
    """
    operator = getattr(torch.ops.mmvmamba, name).default
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")

    def kernel(*arguments: Any) -> Any:
        # Below here autocast is done with, or this rule would be asked again.
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operator(*cast(arguments, torch.get_autocast_dtype(device_type)))

    _LIBRARY.impl(name, kernel, key.name)
    operator.py_impl(key)(kernel)  # for torch.export, which dispatches in Python


def refuse_second_derivative(name: str) -> None:
    """Make differentiating ``mmvmamba::<name>_backward`` an error that says what can be differentiated instead."""

    def refuse(_ctx: Any, *_grads: Any) -> None:
        raise BackendError(
            f"mmvmamba::{name} has no second derivative; pass backend='reference', which can be differentiated any "
            "number of times"
        )

    torch.library.register_autograd(f"mmvmamba::{name}_backward", refuse)


def chunk_count(length: int) -> int:
    """Number of states a scan over ``length`` positions saves for its backward."""
    return (length + CHUNK - 1) // CHUNK
