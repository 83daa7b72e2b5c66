"""Which implementation of the operators runs, and why not another one.

`choose_backend` is the ladder: a backend asked for by name runs or raises with the reason; without a name the best
one that can run is taken, and falling back to the plain PyTorch path warns once per process.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mmvmamba.envs import cpu_capability_limit, is_first_rank, requested_backend
from mmvmamba.errors import BackendError, ConfigError, nearest_spelling
from mmvmamba.ops import extension

BACKENDS = ("compiled", "reference")
"""Best first. ``compiled``: the C++ kernels of ``csrc/``; ``reference``: plain PyTorch."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on a device, and why not."""

    available: bool
    reason: str


class Choice(NamedTuple):
    """The backend to run, and whether it was asked for by name."""

    name: str
    pinned: bool


class _Default(NamedTuple):
    """What calls with ``backend=None`` use, and who said so."""

    name: str | None
    origin: str


_default = _Default(requested_backend(), "the environment variable MMVMAMBA_BACKEND")
_warned = False
_portable_kernels_checked = False


def why_not_compiled(device_type: str) -> str | None:
    """Return why the ``compiled`` backend cannot run on a device type, or None."""
    if not extension.HAS_EXTENSION:
        return extension.EXTENSION_PROBLEM
    if device_type != "cpu":
        return (
            f"this version has compiled kernels for the CPU only and the tensors are on {device_type}; move model and "
            "data to the CPU to use them"
        )
    return None


def available_backends(device: str | torch.device = "cpu") -> dict[str, BackendStatus]:
    """Report every backend, best first, with the reason where it cannot run.

    Args:
        device: The device the operators would run on.
    """
    problem = why_not_compiled(torch.device(device).type)
    return {
        "compiled": BackendStatus(problem is None, problem or "C++ kernels"),
        "reference": BackendStatus(True, "plain PyTorch, any device, slow"),
    }


def check_backend_name(name: str, origin: str = "the argument backend") -> str:
    """Return ``name`` if it is a backend.

    Args:
        name: What was asked for.
        origin: Where, for the message.

    Raises:
        ConfigError: It is not.
    """
    if name not in BACKENDS:
        raise ConfigError(
            f"unknown backend {name!r} in {origin}; expected one of {', '.join(BACKENDS)}, or nothing for the "
            f"automatic choice.{nearest_spelling(name, BACKENDS)}"
        )
    return name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Fix the backend of every operator call with ``backend=None`` inside the ``with`` block.

    The setting belongs to the process, not to a thread.

    Args:
        name: A backend name, or None for the automatic choice.

    Raises:
        ConfigError: The name is unknown.
    """
    global _default
    before = _default
    origin = "use_backend"
    _default = _Default(None if name is None else check_backend_name(name, origin), origin)
    try:
        yield
    finally:
        _default = before


def choose_backend(name: str | None, device_type: str) -> Choice:
    """Return the backend to run.

    Args:
        name: A backend name, or None for the one set by `use_backend` or ``MMVMAMBA_BACKEND``, else the best one.
        device_type: ``"cpu"``, ``"cuda"``, ...

    Raises:
        ConfigError: The name is unknown.
        BackendError: The named backend cannot run; the message gives the reason.
    """
    origin = "the argument backend"
    if name is None:
        name, origin = _default
    problem = why_not_compiled(device_type)
    if name is None:
        if problem is None:
            warn_of_portable_kernels()
            return Choice("compiled", False)
        warn_of_fallback(device_type)
        return Choice("reference", False)
    if check_backend_name(name, origin) == "compiled":
        if problem is not None:
            raise BackendError(f"backend 'compiled' was asked for by {origin} and cannot run: {problem}")
        warn_of_portable_kernels()
    return Choice(name, True)


def warn_of_portable_kernels() -> None:
    """Tell the user, once per process and on rank 0 only, that this processor is too old for the fast CPU kernels."""
    global _portable_kernels_checked
    if torch.compiler.is_compiling() or _portable_kernels_checked:
        return
    _portable_kernels_checked = True
    wanted = cpu_capability_limit() == "default"
    if wanted or extension.CPU_CAPABILITY != "default" or not is_first_rank():
        return
    warnings.warn(
        "mmvmamba runs its portable CPU kernels, several times slower than the others, because this processor has "
        "neither AVX2 with FMA nor AVX-512 nor NEON. The results are the same; use a newer processor for speed.",
        stacklevel=5,
    )


def warn_of_fallback(device_type: str) -> None:
    """Tell the user, once per process and on rank 0 only, that the plain PyTorch path is in use."""
    global _warned
    # A trace must neither warn nor change module state; the kernel that runs later warns. Meta tensors compute nothing.
    if _warned or torch.compiler.is_compiling() or device_type == "meta":
        return
    _warned = True
    if not is_first_rank():
        return
    cost = (
        "on a CPU scan2d is 9 to 105 times slower than compiled (python -m benchmarks.ops, VMamba-T at 224x224)"
        if device_type == "cpu"
        else "it launches several small operations per position, so expect it to be slow"
    )
    warnings.warn(
        "mmvmamba falls back to plain PyTorch ('reference' backend), whose scans walk over the positions in "
        f"Python: {cost}. Reason and cure: {why_not_compiled(device_type)}",
        stacklevel=5,
    )
