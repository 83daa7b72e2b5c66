"""What the dispatcher operators of all scans have in common: kernels of last resort, fakes, autograd, autocast.

`declare` attaches the parts of one scan to its two operators, ``mmvmamba::<op>`` and ``mmvmamba::<op>_triton``. CUDA
kernels attach themselves to the first from C++ and take precedence there over what is attached here, also on a GPU for
which they have no code: `choose_backend` never goes there; a trace made elsewhere may, and raises CUDA's error.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmvmamba.ops.backends import warn_of_fallback, why_not
from mmvmamba.ops.library import TWINS, refuse_second_derivative, register_autocast, register_fallback, twin

Kernel = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class ScanParts:
    """The functions that make up a scan operator; all take the arguments of its schema."""

    forward: Kernel
    """Plain PyTorch."""
    backward: Kernel
    """Plain PyTorch."""
    fake_forward: Kernel
    fake_backward: Kernel
    setup_context: Callable[..., None]
    autograd: Callable[..., tuple[Any, ...]]
    """Takes the dispatcher's operator of the backward first, then what autograd gives."""
    gradients: int
    """How many gradients of outputs the arguments of ``backward`` begin with; the per-position tensors follow."""
    streams: tuple[int, ...]
    """Positions of the per-position tensors among the arguments of ``forward``."""
    package: str = ""
    """Package in `mmvmamba.ops` that has the ``triton_kernels``, where it is not named as the operator."""
    prefix: str = ""
    """What the names of their functions ``forward`` and ``backward`` begin with."""
    plain_is_good: bool = False
    """Whether plain PyTorch is made of large products, so that nobody need be told that it runs."""


def declare(op: str, parts: ScanParts) -> None:
    """Attach ``parts`` to both operators of a scan.

    Args:
        op: Name of the scan.
        parts: What it is made of.
    """
    for suffix in TWINS:
        name, backward_name = twin(op, suffix), twin(f"{op}_backward", suffix)
        register_fallback(name, _kernel(op, parts, False, suffix))
        register_fallback(backward_name, _kernel(op, parts, True, suffix))
        torch.library.register_fake(f"mmvmamba::{name}", parts.fake_forward)
        torch.library.register_fake(f"mmvmamba::{backward_name}", parts.fake_backward)
        differentiate = functools.partial(parts.autograd, getattr(torch.ops.mmvmamba, backward_name))
        torch.library.register_autograd(f"mmvmamba::{name}", differentiate, setup_context=parts.setup_context)
        refuse_second_derivative(name)
        register_autocast(name, functools.partial(autocast_arguments, parts.streams))


def _kernel(op: str, parts: ScanParts, backward: bool, suffix: str) -> Kernel:
    """Return the kernel that runs where no compiled one is attached: Triton where it can, else plain PyTorch.

    Args:
        op: Name of the scan.
        parts: What it is made of.
        backward: Whether it is the kernel of the gradients.
        suffix: Which of `TWINS`.
    """
    plain = parts.backward if backward else parts.forward
    first = parts.gradients if backward else 0  # the argument that decides on device and dtype
    module = f"mmvmamba.ops.{parts.package or op}.triton_kernels"
    function = parts.prefix + ("backward" if backward else "forward")

    def run(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        device, dtype = arguments[first].device, arguments[first].dtype
        # On a CPU Triton means its interpreter, which is for those who ask.
        if (suffix == "_triton" or device.type != "cpu") and why_not("triton", device, dtype) is None:
            kernels = importlib.import_module(module)
            # A backward may be called under autocast, which must not reach the operations inside.
            with torch.autocast(device.type, enabled=False):
                result: Tensor | tuple[Tensor, ...] = getattr(kernels, function)(*arguments)
            return result
        if not parts.plain_is_good:
            warn_of_fallback(device, dtype)
        return plain(*arguments)

    return run


def autocast_arguments(streams: tuple[int, ...], arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments of a scan operator as autocast wants them.

    float32 tensors per position are cast to the autocast dtype, since they are what takes memory and time; parameters
    to float32, in which the state is kept. float64 and integer tensors are left alone.

    Args:
        streams: Positions of the per-position tensors.
        arguments: All arguments.
        dtype: The dtype of autocast.
    """

    def cast(position: int, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        if position not in streams:
            return value.float()
        return value.to(dtype) if value.dtype == torch.float32 else value

    return tuple(cast(position, value) for position, value in enumerate(arguments))
