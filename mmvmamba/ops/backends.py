"""Which implementation of the operators runs, and why not another one.

`choose_backend` is the ladder: a backend asked for by name runs or raises with the reason; without a name the best
one that can run is taken, and falling back to the plain PyTorch path warns once per process.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmvmamba.envs import requested_backend
from mmvmamba.errors import BackendError, ConfigError, nearest_spelling
from mmvmamba.ops import extension

BACKENDS = ("compiled", "reference")
"""Best first. ``compiled``: the C++ kernels of ``csrc/``; ``reference``: plain PyTorch."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on a device, and why not."""

    available: bool
    reason: str


_default: str | None = requested_backend()
_warned = False


def why_not_compiled(device_type: str) -> str | None:
    """Return why the ``compiled`` backend cannot run on a device type, or None."""
    if not extension.HAS_EXTENSION:
        return extension.EXTENSION_PROBLEM
    if device_type != "cpu":
        return f"this version has compiled kernels for cpu only, the tensors are on {device_type}"
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


def check_backend_name(name: str) -> str:
    """Return ``name`` if it is a backend.

    Raises:
        ConfigError: It is not.
    """
    if name not in BACKENDS:
        raise ConfigError(
            f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)} or None for the automatic choice."
            f"{nearest_spelling(name, BACKENDS)}"
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
    _default = None if name is None else check_backend_name(name)
    try:
        yield
    finally:
        _default = before


def choose_backend(name: str | None, device_type: str) -> str:
    """Return the backend to run.

    Args:
        name: A backend name, or None for the one set by `use_backend` or ``MMVMAMBA_BACKEND``, else the best one.
        device_type: ``"cpu"``, ``"cuda"``, ...

    Raises:
        ConfigError: The name is unknown.
        BackendError: The named backend cannot run; the message gives the reason.
    """
    name = _default if name is None else name
    problem = why_not_compiled(device_type)
    if name is None:
        if problem is None:
            return "compiled"
        _warn_once(problem)
        return "reference"
    if check_backend_name(name) == "compiled" and problem is not None:
        raise BackendError(f"backend 'compiled' was asked for by name and cannot run: {problem}")
    return name


def _warn_once(problem: str) -> None:
    """Tell the user once per process that the slow path is in use."""
    global _warned
    # A trace must neither warn nor change module state.
    if _warned or torch.compiler.is_compiling():
        return
    _warned = True
    warnings.warn(
        "mmvmamba falls back to its plain PyTorch scan ('reference' backend), which walks over the positions in "
        "Python: on a CPU the operator is 4 to 40 times slower than compiled (python -m benchmarks.ops, VMamba-T at "
        f"224x224). Reason and cure: {problem}",
        stacklevel=4,
    )
