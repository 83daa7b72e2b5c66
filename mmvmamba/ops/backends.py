"""Which implementation of the operators runs, and why not another one.

`choose_backend` is the ladder: a backend asked for by name runs or raises with the reason; without a name the best
one that can run is taken, and falling back to the plain PyTorch path warns once per process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mmvmamba.envs import cpu_capability_limit, is_first_rank, requested_backend, triton_interpreted
from mmvmamba.errors import BackendError, ConfigError, nearest_spelling
from mmvmamba.ops import extension
from mmvmamba.ops.cuda_archs import covers

BACKENDS = ("compiled", "triton", "reference")
"""Best first. ``compiled``: the C++ and CUDA kernels of ``csrc/``; ``triton``: Triton kernels, compiled when they first
run; ``reference``: plain PyTorch."""

REBUILD_WITH_CUDA = "pip install --no-build-isolation .' in the source tree (needs nvcc and a PyTorch built for CUDA)"
OLDEST_CAPABILITY = (8, 0)
"""The GPU generation whose instructions the CUDA kernels use; that of ``setup.py``."""


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
_warned: set[tuple[str, bool]] = set()
_only_operators: ContextVar[bool] = ContextVar("only_operators", default=False)
_portable_kernels_checked = False


@functools.cache
def device_capability(index: int | None) -> tuple[int, int] | None:
    """Return the compute capability of a GPU, or None where PyTorch finds no GPU.

    Args:
        index: Number of the device; None for the current one when this is first asked.
    """
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


def why_not_compiled(device: str | torch.device) -> str | None:
    """Return why the ``compiled`` backend cannot run on a device, or None."""
    device = torch.device(device)
    if not extension.HAS_EXTENSION:
        return extension.EXTENSION_PROBLEM
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are compiled kernels for cpu and cuda and the tensors are on {device.type}"
    if extension.CUDA_VERSION is None:
        return f"the extension was built without CUDA kernels: run 'MMVMAMBA_WITH_CUDA=1 {REBUILD_WITH_CUDA}"
    capability = device_capability(device.index)
    if capability is None:
        return "PyTorch finds no GPU on this machine"
    if capability < OLDEST_CAPABILITY:
        found, oldest = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
        return (
            f"the CUDA kernels need a GPU of generation {oldest} or newer and this one is {found}: use another backend"
        )
    if not covers(extension.CUDA_ARCHS, capability):
        gpu = ".".join(map(str, capability))
        archs = ";".join((*extension.CUDA_ARCHS, gpu))
        return (
            f"the extension has code for the GPU generations {', '.join(extension.CUDA_ARCHS) or 'none'} and this GPU "
            f'is {gpu}: run \'MMVMAMBA_WITH_CUDA=1 TORCH_CUDA_ARCH_LIST="{archs}" {REBUILD_WITH_CUDA}'
        )
    return None


def why_not_triton(device: str | torch.device) -> str | None:
    """Return why the ``triton`` backend cannot run on a device, or None."""
    device = torch.device(device)
    if device.type == "cpu" and not triton_interpreted():
        return "Triton kernels run on GPUs (on a CPU only in Triton's interpreter: TRITON_INTERPRET=1, for tests)"
    if device.type not in ("cpu", "cuda"):
        return f"there are Triton kernels for cuda and the tensors are on {device.type}"
    if device.type == "cuda" and device_capability(device.index) is None:
        return "PyTorch finds no GPU on this machine"
    return triton_problem(device.type)


@functools.cache
def triton_problem(device_type: str) -> str | None:
    """Ask Triton itself, once; only here and in its kernels it is imported."""
    try:
        answer: str | None = importlib.import_module("mmvmamba.ops.triton_support").why_not_triton(device_type)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return answer


def _problem(name: str, device_type: str, index: int | None, double: bool) -> str | None:
    """Return why a backend cannot run on tensors of a device, or None."""
    if name == "reference":
        return None
    if double and device_type == "cuda":
        return (
            "float64 tensors have no GPU kernel, since the scans accumulate in float32 there: cast them with .float(), "
            "or stay with backend='reference'"
        )
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    return why_not_compiled(device) if name == "compiled" else why_not_triton(device)


# A trace calls this with constants and records the answer; it must not follow an import of Triton. This is what
# torch.compiler.assume_constant_result sets, which would import the whole compiler with the operators.
_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why a backend cannot run the scans on tensors of a device and dtype, or None."""
    return _problem(name, device.type, device.index, dtype == torch.float64)


def available_backends(device: str | torch.device = "cpu") -> dict[str, BackendStatus]:
    """Report every backend, best first, with the reason where it cannot run.

    Args:
        device: The device the operators would run on.
    """
    device = torch.device(device)
    means = {
        "compiled": "CUDA kernels" if device.type == "cuda" else "C++ kernels",
        "triton": "Triton kernels, compiled on first use" if device.type == "cuda" else "Triton's interpreter, slow",
        "reference": "plain PyTorch, any device, slow",
    }
    problems = {name: why_not(name, device) for name in BACKENDS}
    return {name: BackendStatus(problem is None, problem or means[name]) for name, problem in problems.items()}


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


def choose_backend(
    name: str | None, device: str | torch.device, dtype: torch.dtype = torch.float32, *, cpu_only: bool = False,
    cuda_kernels: bool = True,
) -> Choice:  # fmt: skip
    """Return the backend to run.

    Args:
        name: A backend name, or None for the one set by `use_backend` or ``MMVMAMBA_BACKEND``, else the best one.
        device: Where the tensors are, e.g. ``"cpu"``.
        dtype: That of the tensors: float64 has no kernel on a GPU.
        cpu_only: The operator has a compiled kernel for the CPU and no other; elsewhere PyTorch's own is good. A name
            that cannot be had is refused only where it is the argument ``name``.
        cuda_kernels: Whether the operator has compiled kernels for GPUs. Without them it has Triton's there, and
            PyTorch's own is good too; ``cpu_only`` says that it has neither.

    Raises:
        ConfigError: The name is unknown.
        BackendError: The named backend cannot run; the message gives the reason.
    """
    device = torch.device(device)
    origin = "the argument backend"
    if name is None:
        name, origin = _default
        if name in _lacking(device, cpu_only, cuda_kernels):
            name = None  # said of the whole process, for the scans; this operator has other ways to run here
    pinned = name is not None
    if name is None:
        name = _best(device, dtype, _lacking(device, cpu_only, cuda_kernels))
        if name == "reference" and not cpu_only and not torch.compiler.is_compiling() and _only_operators.get():
            name = "operator"
    elif check_backend_name(name, origin) != "reference":
        problem = why_not(name, device, dtype)
        if cpu_only and (name == "triton" or device.type != "cpu"):
            problem = "this operator has compiled kernels on the CPU and no others"
        elif name in _lacking(device, cpu_only, cuda_kernels):
            problem = "this operator has compiled kernels on the CPU alone; on a GPU it has Triton's"
        if problem is not None:
            raise BackendError(f"backend {name!r} was asked for by {origin} and cannot run: {problem}")
    if name == "compiled" and device.type == "cpu":
        warn_of_portable_kernels()
    return Choice(name, pinned)


@contextlib.contextmanager
def only_operators() -> Iterator[None]:
    """Let scans without a backend's name be operators of the dispatcher, whose last kernel is plain PyTorch.

    Without it, calls that come down to plain PyTorch leave the dispatcher out, and what watches it sees none of them.
    A backend asked for by name, ``"reference"`` too, stays what it is.
    """
    token = _only_operators.set(True)
    try:
        yield
    finally:
        _only_operators.reset(token)


def _lacking(device: torch.device, cpu_only: bool, cuda_kernels: bool) -> tuple[str, ...]:
    """Return the backends of which an operator has no kernel on a device, whatever is installed."""
    compiled = () if device.type == "cpu" or (cuda_kernels and not cpu_only) else ("compiled",)
    return (*compiled, "triton") if cpu_only else compiled


def _best(device: torch.device, dtype: torch.dtype, lacking: tuple[str, ...]) -> str:
    """Return the best backend that can run, with a warning if it is the last and others would be better."""
    # Triton's interpreter is slower than plain PyTorch: on a CPU it runs when it is asked for.
    names = ("compiled",) if device.type == "cpu" else ("compiled", "triton")
    for name in names:
        if name not in lacking and why_not(name, device, dtype) is None:
            return name
    if "compiled" not in lacking:
        warn_of_fallback(device, dtype)
    return "reference"


def operator_suffix(chosen: Choice, device: torch.device) -> str:
    """Return what the name of the dispatcher operator that runs a backend ends with."""
    if chosen.name == "reference":
        # A trace of the automatic choice. Without CUDA kernels in the binary either operator would come down to plain
        # PyTorch, and the first may find better where the trace runs; with them it would call what cannot run here.
        return "_triton" if device.type == "cuda" and extension.CUDA_VERSION is not None else ""
    return "_triton" if chosen.name == "triton" else ""


def runs_reference(chosen: Choice, device: torch.device) -> bool:
    """Return whether a call is the reference, step by step, and not an operator of the dispatcher.

    A trace of the automatic choice records the operator (one node, whose kernel is plain PyTorch), not a time loop, and
    on the meta device, where only shapes are wanted, the operator answers at once.
    """
    only_shapes = torch.compiler.is_compiling() or device.type == "meta"
    return chosen.name == "reference" and (chosen.pinned or not only_shapes)


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


def warn_of_fallback(device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Tell the user, once per process and on rank 0 only, that the plain PyTorch path is in use.

    Args:
        device: Where the tensors are.
        dtype: That of the tensors. float64 on a GPU falls back for a reason of its own and is told separately.
    """
    # A trace must neither warn nor change module state; the kernel that runs later warns. Meta tensors compute nothing.
    if torch.compiler.is_compiling() or device.type == "meta":
        return
    key = (device.type, dtype == torch.float64)
    if key in _warned:
        return
    _warned.add(key)
    if not is_first_rank():
        return
    on_cpu = device.type == "cpu"
    cost = (
        "on a CPU scan2d is 9 to 105 times slower than compiled (python -m benchmarks.ops, VMamba-T at 224x224)"
        if on_cpu
        else "it launches several small operations per position, so expect it to be slow"
    )
    asked = {name: why_not(name, device, dtype) for name in ("compiled", "triton")}
    problems = {name: problem for name, problem in asked.items() if problem is not None}
    if on_cpu and "compiled" in problems:
        problems.pop("triton", None)  # not what anybody wants there
    if len(set(problems.values())) == 1:
        reasons = next(iter(problems.values()))
    else:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    warnings.warn(
        "mmvmamba falls back to plain PyTorch ('reference' backend), whose scans walk over the positions in "
        f"Python: {cost}. Reason and cure: {reasons}",
        stacklevel=6,
    )
