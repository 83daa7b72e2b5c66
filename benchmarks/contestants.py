"""Who is timed at the operators' boundaries, and what each of them is not asked to do, with the reason."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import upstream_path
from benchmarks.cases import BACKWARD, CORE, SCAN, SEQUENCE, Case, Problem, run_operator
from mmvmamba.ops import available_backends, use_backend

Forward = Callable[[Problem], Tensor]

REFERENCE_BYTES = {"forward": 1 << 30, BACKWARD: 200 << 20}
"""Largest (b, k d, l, n) tensor of what materialises about ten of them; a machine with 16 GB can then hold them."""
UPSTREAM_BACKWARD_LENGTH = 3136
"""The first map of a 224x224 image: 56x56."""


_SLOW_ROUNDS = 2
"""Rounds of a contestant whose backward takes seconds, after the run of its check."""


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
    """

    name: str
    forward: Forward
    boundaries: tuple[str, ...]
    elsewhere: str = ""
    problem: str | None = None
    limit: dict[str, int] | None = None
    backward_length: int | None = None

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
        return _SLOW_ROUNDS if passes == BACKWARD and self.backward_length is not None else None


def _ours(backend: str) -> Forward:
    def forward(problem: Problem) -> Tensor:
        with use_backend(backend):
            if problem.boundary == CORE:
                assert problem.layer is not None  # for the type checker: a core problem has one
                return problem.layer.scan(problem.leaves["x"])
            return run_operator(problem.boundary, problem.leaves)

    return forward


def _upstream(problem: Problem) -> Tensor:
    leaves = problem.leaves
    if problem.boundary == CORE:
        names = ("x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
        return upstream_path.ss2d_core(*(leaves[name] for name in names))
    return upstream_path.selective_scan(*(leaves[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")))


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


def contestants() -> list[Contestant]:
    """Everyone, ours first; those that cannot run here carry the reason."""
    backends = available_backends("cpu")
    compiled = None if backends["compiled"].available else backends["compiled"].reason
    one_dimensional = "it has no 2D scan and no projections"
    cuda_only = "its kernels take CUDA tensors only, this benchmark times the CPU"
    return [
        Contestant("compiled", _ours("compiled"), (SCAN, CORE, SEQUENCE), problem=compiled),
        Contestant("reference", _ours("reference"), (SCAN, CORE, SEQUENCE), limit=REFERENCE_BYTES),
        Contestant(
            "upstream path", _upstream, (CORE, SEQUENCE), "upstream projects after the cross-scan: no such boundary",
            limit=REFERENCE_BYTES, backward_length=UPSTREAM_BACKWARD_LENGTH,
        ),
        Contestant(
            "mambapy", _mambapy, (SEQUENCE,), one_dimensional, problem=_installed("mambapy"), limit=REFERENCE_BYTES
        ),
        Contestant("mamba_ssm", _no_cpu, (SEQUENCE,), one_dimensional, _installed("mamba_ssm") or cuda_only),
        Contestant(
            "selective_scan_cuda_oflex", _no_cpu, (SEQUENCE,), one_dimensional,
            _installed("selective_scan_cuda_oflex") or cuda_only,
        ),
    ]  # fmt: skip
