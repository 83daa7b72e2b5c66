"""Who is timed at the operators' boundaries, and what each of them is not asked to do, with the reason."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import foreign_kernels, upstream_path
from benchmarks.cases import BACKWARD, CORE, SCAN, SEQUENCE, Case, Problem, run_operator
from mmvmamba.ops import available_backends, use_backend

Forward = Callable[[Problem], Tensor]

REFERENCE_BYTES = {"forward": 1 << 30, BACKWARD: 200 << 20}
"""Largest (b, k d, l, n) tensor of what materialises about ten of them; a machine with 16 GB can then hold them."""
UPSTREAM_BACKWARD_LENGTH = 3136
"""The first map of a 224x224 image: 56x56."""
GPU_REFERENCE_BYTES = {"forward": 4 << 30, BACKWARD: 2 << 30}
GPU_LOOP_LENGTH = {"forward": 4096, BACKWARD: 1024}
"""Longest sequence of what launches several kernels for every position."""

_SLOW_ROUNDS = 2
"""Rounds of a contestant whose backward takes seconds, after the run of its check."""
_GPU_SLOW_ROUNDS = 3


@dataclass(frozen=True)
class Contestant:
    """One implementation.

    Attributes:
        name: As printed.
        forward: Compute the output of a problem from its leaves, recorded by autograd if gradients are on.
        boundaries: Where it can take part; elsewhere ``elsewhere`` says why not.
        elsewhere: The reason.
        problem: Why it cannot run here at all, or None.
        limit: Bytes of one tensor of all states by pass, or None for no limit.
        backward_length: Longest sequence of its forward+backward; such a run is one round.
        loop_length: Longest sequence by pass of what walks over the positions on a GPU, or None for no limit.
        foreign: Whether it is another project's: one that disagrees is left out and named, ours end the run.
    """

    name: str
    forward: Forward
    boundaries: tuple[str, ...]
    elsewhere: str = ""
    problem: str | None = None
    limit: dict[str, int] | None = None
    backward_length: int | None = None
    loop_length: dict[str, int] | None = None
    foreign: bool = False

    def why_not(self, case: Case, boundary: str, passes: str) -> str | None:
        """Return why it is not timed here, or None."""
        if self.problem is not None:
            return self.problem
        if boundary not in self.boundaries:
            return self.elsewhere
        size = case.state_bytes()
        if self.limit is not None and size > self.limit[passes]:
            return (
                f"it keeps about ten tensors of {size >> 20} MiB (b, k d, l, n), over the declared limit of "
                f"{self.limit[passes] >> 20} MiB each for {passes}"
            )
        if self.loop_length is not None and case.length > self.loop_length[passes]:
            return (
                f"it launches several kernels for every position and l is {case.length}, over the declared limit of "
                f"{self.loop_length[passes]} for {passes}"
            )
        if passes == BACKWARD and self.backward_length is not None and case.length > self.backward_length:
            return (
                f"its backward grows about as l^1.7 and l is {case.length}, over the declared limit of "
                f"{self.backward_length}"
            )
        return None

    def where(self, case: Case, boundary: str, passes: str) -> str:
        """Return for which measurements the reason of `why_not` holds, for a message."""
        if self.problem is not None:
            return ""
        return f" at {case.name}, {boundary}, {passes}" if boundary in self.boundaries else f", boundary {boundary}"

    def rounds(self, passes: str) -> int | None:
        """How many rounds it is asked for; None for as many as the others."""
        if self.loop_length is not None:
            return _GPU_SLOW_ROUNDS
        return _SLOW_ROUNDS if passes == BACKWARD and self.backward_length is not None else None


def _ours(backend: str) -> Forward:
    def forward(problem: Problem) -> Tensor:
        with use_backend(backend):
            if problem.boundary == CORE:
                assert problem.layer is not None  # for the type checker: a core problem has one
                return problem.layer.scan(problem.leaves["x"])
            return run_operator(problem.boundary, problem.leaves)

    return forward


def _upstream(scan: Callable[..., Tensor]) -> Forward:
    def forward(problem: Problem) -> Tensor:
        leaves = problem.leaves
        if problem.boundary == CORE:
            names = ("x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
            return upstream_path.ss2d_core(*(leaves[name] for name in names), scan=scan)
        return scan(*(leaves[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")))

    return forward


def _mambapy(problem: Problem) -> Tensor:
    """The parallel scan of mamba.py on (b, l, d, n) tensors, with what its Mamba block does around it."""
    pscan = importlib.import_module("mambapy.pscan").pscan
    u, delta, A, B, C, D, bias = (problem.leaves[n].float() for n in ("u", "delta", "A", "B", "C", "D", "delta_bias"))
    u, delta = u.transpose(1, 2), F.softplus(delta.transpose(1, 2) + bias)  # (b, l, d)
    B, C = B[:, 0].transpose(1, 2), C[:, 0].transpose(1, 2)  # (b, l, n)
    decay = torch.exp(delta.unsqueeze(-1) * A)
    injection = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    y = (pscan(decay, injection) @ C.unsqueeze(-1)).squeeze(3) + D * u
    return y.transpose(1, 2)


def _no_cpu(problem: Problem) -> Tensor:
    raise RuntimeError(f"{problem.case.name}: this contestant has no CPU kernel and must not be called")


def _installed(module: str) -> str | None:
    return None if importlib.util.find_spec(module) is not None else "not installed"


_NO_SCAN = "upstream projects after the cross-scan: no such boundary"
_ONE_DIMENSIONAL = "it has no 2D scan and no projections"


def contestants(device: str = "cpu") -> list[Contestant]:
    """Everyone for a device, ours first; those that cannot run here carry the reason."""
    return _on_cpu() if device == "cpu" else _on_gpu(device)


def _ours_on(device: str, names: Sequence[str]) -> list[Contestant]:
    known = available_backends(device)
    return [
        Contestant(
            name, _ours(name), (SCAN, CORE, SEQUENCE), problem=None if known[name].available else known[name].reason
        )
        for name in names
        if name in known
    ]


def _on_cpu() -> list[Contestant]:
    cuda_only = "its kernels take CUDA tensors only, this run times the CPU"
    return [
        *_ours_on("cpu", ["compiled"]),
        Contestant("reference", _ours("reference"), (SCAN, CORE, SEQUENCE), limit=REFERENCE_BYTES),
        Contestant(
            "upstream path", _upstream(upstream_path.selective_scan), (CORE, SEQUENCE), _NO_SCAN,
            limit=REFERENCE_BYTES, backward_length=UPSTREAM_BACKWARD_LENGTH,
        ),
        Contestant(
            "mambapy", _mambapy, (SEQUENCE,), _ONE_DIMENSIONAL, problem=_installed("mambapy"), limit=REFERENCE_BYTES
        ),
        Contestant("mamba_ssm", _no_cpu, (SEQUENCE,), _ONE_DIMENSIONAL, _installed("mamba_ssm") or cuda_only),
        Contestant(
            "selective_scan_cuda_oflex", _no_cpu, (SEQUENCE,), _ONE_DIMENSIONAL,
            _installed("selective_scan_cuda_oflex") or cuda_only,
        ),
    ]  # fmt: skip


def _on_gpu(device: str) -> list[Contestant]:
    return [
        *_ours_on(device, ["compiled", "triton"]),
        Contestant(
            "reference", _ours("reference"), (SCAN, CORE, SEQUENCE),
            limit=GPU_REFERENCE_BYTES, loop_length=GPU_LOOP_LENGTH,
        ),
        Contestant(
            "upstream path", _upstream(upstream_path.selective_scan), (CORE, SEQUENCE), _NO_SCAN,
            limit=GPU_REFERENCE_BYTES, loop_length=GPU_LOOP_LENGTH,
        ),
        *(
            Contestant(name, _upstream(scan), (CORE, SEQUENCE), _NO_SCAN, _installed(name), foreign=True)
            for name, scan in (
                ("selective_scan_cuda_oflex", foreign_kernels.oflex),
                ("mamba_ssm", foreign_kernels.mamba_ssm),
            )
        ),
    ]  # fmt: skip
