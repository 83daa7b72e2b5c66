"""The shapes the operators are timed at, and the problems built from them.

A problem is a case, a boundary and a dtype: its leaves (what gradients are taken of) and what the reference computes
from them in float64. Three boundaries: ``scan`` is ``scan2d`` alone; ``core`` goes from the map after SiLU to the
merged map, x_proj and dt_proj included, with the parameters of an `SS2D` layer; ``sequence`` is ``selective_scan``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmvmamba.models.layers import SS2D
from mmvmamba.ops import available_backends, scan2d, selective_scan, use_backend
from mmvmamba.testing import FORWARD_BOUND, PARAMETER_GRAD_BOUND, STREAM_GRAD_BOUND

ROUTES = 4
STREAMS = ("u", "delta", "B", "C", "x", "projections")
"""Leaves with one value for every position."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORWARD, BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, BACKWARD)
SCAN, CORE, SEQUENCE = "scan", "core", "sequence"
BOUNDARIES = (SCAN, CORE, SEQUENCE)

CHECK_BYTES = 256 << 20
"""A (b, k d, l, n) tensor in float64 may be this large in a check; beyond, a sample of the channels is compared."""
CHECKED_CHANNELS = 24
CHECKED_BATCH = 4
"""Of a larger batch the first and the last entry are compared."""

#: Rounding of x_proj comes on top of the operator's own error, in half precision also that of its weight.
_CORE_BOUND = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_CORE_GRAD_BOUND = {torch.float32: 2e-5, torch.float16: 7e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """One shape; a sequence of length l has h = 1 and w = l."""

    name: str
    group: str
    b: int
    h: int
    w: int
    d: int
    n: int = 1
    blocks: int = 0
    """How many blocks of the model of its group run at this shape; 0 where the group is no model."""
    boundaries: tuple[str, ...] = (SCAN, CORE)

    @property
    def r(self) -> int:
        """Rank of the step-size projection."""
        return math.ceil(self.d / 16)

    @property
    def length(self) -> int:
        """Positions l."""
        return self.h * self.w

    @property
    def shape(self) -> list[int]:
        """(b, h, w, d), or (b, d, l) for a sequence."""
        return [self.b, self.d, self.w] if self.boundaries == (SEQUENCE,) else [self.b, self.h, self.w, self.d]

    def state_bytes(self, itemsize: int = 4) -> int:
        """Bytes of one tensor that holds every state of every position, (b, k d, l, n)."""
        routes = 1 if self.boundaries == (SEQUENCE,) else ROUTES
        return self.b * routes * self.d * self.length * self.n * itemsize


def _vmamba_tiny(group: str, h: int, w: int, dims: tuple[int, ...], blocks: tuple[int, ...], b: int = 1) -> list[Case]:
    """The stages of a VMamba with d_state 1 and ssm_ratio 1 for a first map (h, w)."""
    cases = []
    for stage, (d, count) in enumerate(zip(dims, blocks, strict=True), 1):
        cases.append(Case(f"{group} stage {stage}", group, b, h, w, d, blocks=count))
        h, w = -(-h // 2), -(-w // 2)
    return cases


_TINY = ((96, 192, 384, 768), (2, 2, 8, 2))
CASES: tuple[Case, ...] = (
    *_vmamba_tiny("224", 56, 56, *_TINY),
    *_vmamba_tiny("512", 128, 128, *_TINY),
    *_vmamba_tiny("800x1216", 200, 304, *_TINY),
    Case("1536 stage 1", "1536", 1, 384, 384, 96, boundaries=(SCAN,)),
    Case("odd", "odd", 3, 57, 43, 100),
    *(Case(f"n{n}", "states", 1, 28, 28, 192, n=n) for n in (8, 16, 64)),
    *(
        Case(f"sequence {l // 1024}K", "sequence", 2, 1, l, 1536, n=16, boundaries=(SEQUENCE,))
        for l in (1024, 4096, 16384)  # noqa: E741 (the length of a sequence is l everywhere here)
    ),
)
"""performance.md section 5 with b = 1 on a CPU."""
GPU_CASES: tuple[Case, ...] = (
    *_vmamba_tiny("224", 56, 56, *_TINY, b=128),
    *_vmamba_tiny("512", 128, 128, *_TINY, b=16),
    *_vmamba_tiny("800x1216", 200, 304, *_TINY, b=2),
    Case("1536 stage 1", "1536", 1, 384, 384, 96),
    Case("odd", "odd", 3, 57, 43, 100),
    *(Case(f"n{n}", "states", 64, 28, 28, 192, n=n) for n in (8, 16, 64)),
    *(Case(f"sequence {1 << k}K", "sequence", 8, 1, 1024 << k, 1536, n=16, boundaries=(SEQUENCE,)) for k in range(7)),
)
"""performance.md section 5 with the batches of a GPU."""
SMOKE_CASES: tuple[Case, ...] = (
    *_vmamba_tiny("smoke", 4, 6, (16, 32), (2, 1)),
    Case("smoke sequence", "smoke", 1, 1, 20, 16, n=2, boundaries=(SEQUENCE,)),
)
"""Timed only when asked for by name: they show that everything runs, not how fast."""


def choose_cases(names: list[str] | None, device: str = "cpu") -> list[Case]:
    """Return the cases of a device whose name or group is listed; all of them for None.

    Raises:
        ValueError: A name matches none.
    """
    cases = CASES if device == "cpu" else GPU_CASES
    if names is None:
        return list(cases)
    everything = (*cases, *SMOKE_CASES)
    known = list(dict.fromkeys([case.group for case in everything] + [case.name for case in everything]))
    for name in names:
        if name not in known:
            raise ValueError(f"--shapes: found {name!r}, expected names among {', '.join(known)}. Correct it.")
    return [case for case in everything if case.name in names or case.group in names]


@dataclass
class Problem:
    """Leaves of one case at one boundary, the weight of its output, and what is expected of a contestant."""

    case: Case
    boundary: str
    dtype: torch.dtype
    leaves: dict[str, Tensor]
    grad_out: Tensor
    layer: SS2D | None = None
    bounds: dict[str, float] = field(default_factory=dict)

    def channels(self) -> Tensor:
        """The channels a check compares: all, or a sample where float64 states of all would not fit."""
        d, share = self.case.d, len(self.entries()) / self.case.b
        if self.boundary == CORE or self.case.state_bytes(8) * share <= CHECK_BYTES:
            return torch.arange(d)
        return torch.linspace(0, d - 1, CHECKED_CHANNELS).long()

    def entries(self) -> Tensor:
        """The entries of the batch a check compares: all, or of a large batch the first and the last."""
        b = self.case.b
        return torch.arange(b) if b <= CHECKED_BATCH else torch.tensor([0, b - 1])

    @property
    def device(self) -> torch.device:
        """Where the leaves are."""
        return self.grad_out.device

    def stream_bytes(self) -> int:
        """Bytes of the leaves that differ from call to call, and of the weight of the output."""
        streams = [self.leaves[name] for name in STREAMS if name in self.leaves]
        return sum(t.numel() * t.element_size() for t in (*streams, self.grad_out))

    def another(self) -> Problem:
        """Return the same problem with other random activations; parameters are shared."""
        fresh = {
            name: torch.randn_like(leaf).requires_grad_() if name in STREAMS else leaf
            for name, leaf in self.leaves.items()
        }
        return dataclasses.replace(self, leaves=fresh, grad_out=torch.randn_like(self.grad_out))


def build_problem(case: Case, boundary: str, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Draw random inputs of a case on a device; activations have ``dtype``, parameters are float32."""
    with torch.device(device):
        return _core_problem(case, dtype) if boundary == CORE else _operator_problem(case, boundary, dtype)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape)


def _operator_problem(case: Case, boundary: str, dtype: torch.dtype) -> Problem:
    b, h, w, d, n, r, k = case.b, case.h, case.w, case.d, case.n, case.r, ROUTES
    if boundary == SEQUENCE:
        leaves = {
            "u": _random(b, d, w).to(dtype),
            "delta": _random(b, d, w).to(dtype),
            "A": -torch.rand(d, n) - 0.5,
            "B": _random(b, 1, n, w).to(dtype),
            "C": _random(b, 1, n, w).to(dtype),
            "D": torch.ones(d),
            "delta_bias": _random(d) - 3,
        }
        shape: tuple[int, ...] = (b, d, w)
    else:
        leaves = {
            "x": _random(b, h, w, d).to(dtype),
            "projections": _random(b, h, w, k, r + 2 * n).to(dtype),
            "dt_weight": _random(k, d, r) * r**-0.5,
            "dt_bias": _random(k, d) - 3,
            "A": -torch.rand(k, d, n) - 0.5,
            "D": torch.ones(k, d),
        }
        shape = (b, h, w, d)
    bounds = {"out": FORWARD_BOUND[dtype]}
    for name, leaf in leaves.items():
        leaf.requires_grad_()
        bounds[name] = (STREAM_GRAD_BOUND if name in STREAMS else PARAMETER_GRAD_BOUND)[dtype]
    return Problem(case, boundary, dtype, leaves, _random(*shape), bounds=bounds)


def _core_problem(case: Case, dtype: torch.dtype) -> Problem:
    layer = SS2D(case.d, d_state=case.n, ssm_ratio=1.0, gated=False, conv_kernel=1)
    names = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
    x = _random(case.b, case.h, case.w, case.d).to(dtype).requires_grad_()
    leaves = {"x": x} | {name: layer.get_parameter(name) for name in names}
    bounds = {"out": _CORE_BOUND[dtype]} | dict.fromkeys(leaves, _CORE_GRAD_BOUND[dtype])
    grad_out = _random(case.b, case.h, case.w, case.d)
    return Problem(case, CORE, dtype, leaves, grad_out, layer, bounds)


def expect(problem: Problem, passes: str) -> dict[str, Tensor]:
    """Compute in float64 on the CPU: the output and, with the backward, the gradient of every leaf.

    Only the channels of `Problem.channels` and the entries of `Problem.entries` are computed. Both are independent, and
    gradients shared by all of them (of projections, B, C, parameters) are those of an output gradient that is zero
    elsewhere: `sampled_grad` makes it.
    """
    cut = sampled(problem, problem.leaves)
    grad = sampled(problem, {"out": problem.grad_out})["out"].double()
    with use_backend(_exact_backend(problem)):
        if problem.boundary == CORE:
            return _expect_core(problem, cut["x"], grad, passes)
        leaves = {name: leaf.detach().double().requires_grad_(passes == BACKWARD) for name, leaf in cut.items()}
        return _with_gradients(run_operator(problem.boundary, leaves), leaves, grad, passes)


def _exact_backend(problem: Problem) -> str:
    """The reference; for the long maps of a GPU the compiled CPU kernels, which compute in float64 as well."""
    if problem.device.type != "cpu" and available_backends("cpu")["compiled"].available:
        return "compiled"
    return "reference"


def _expect_core(problem: Problem, x: Tensor, grad: Tensor, passes: str) -> dict[str, Tensor]:
    assert problem.layer is not None  # for the type checker: a core problem has one
    layer = copy.deepcopy(problem.layer).cpu().double()
    leaves = {
        name: layer.get_parameter(name) if name != "x" else x.detach().double().requires_grad_()
        for name in problem.leaves
    }
    with torch.set_grad_enabled(passes == BACKWARD):
        out = layer.scan(leaves["x"])
    return _with_gradients(out, leaves, grad, passes)


def _with_gradients(out: Tensor, leaves: Mapping[str, Tensor], grad: Tensor, passes: str) -> dict[str, Tensor]:
    result = {"out": out.detach()}
    if passes == BACKWARD:
        gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        result |= dict(zip(leaves, gradients, strict=True))
    return result


def run_operator(boundary: str, leaves: Mapping[str, Tensor]) -> Tensor:
    """Call our operator of a boundary on leaves, with the backend that is set."""
    if boundary == SCAN:
        return scan2d(*(leaves[name] for name in ("x", "projections", "dt_weight", "dt_bias", "A", "D")),
                      out_dtype=_wide(leaves["x"]))  # fmt: skip
    u, delta, A, B, C, D, delta_bias = (leaves[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"))
    return selective_scan(u, delta, A, B, C, D, delta_bias, True, out_dtype=_wide(u))


def _wide(stream: Tensor) -> torch.dtype:
    """The layers keep the sum of the directions in float32, whatever the map is."""
    return torch.float64 if stream.dtype == torch.float64 else torch.float32


def sampled_grad(problem: Problem) -> Tensor:
    """The weight of the output in a check: that of the timing, zero on what is not compared."""
    mask = torch.zeros_like(problem.grad_out)
    axis = channel_axis("out", problem)
    assert axis is not None  # for the type checker: an output has channels
    entries, channels = problem.entries().to(mask.device), problem.channels().to(mask.device)
    mask[entries] = mask[entries].index_fill(axis, channels, 1.0)
    return problem.grad_out * mask


def sampled(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The compared channels and entries of leaves, output or gradients, on the CPU."""
    channels, entries = problem.channels(), problem.entries()
    return {name: _cut(name, tensor, problem, channels, entries).cpu() for name, tensor in tensors.items()}


def channel_axis(name: str, problem: Problem) -> int | None:
    """Where the channels of a tensor are; None for those all channels share."""
    if problem.boundary == SEQUENCE:
        return {"u": 1, "delta": 1, "A": 0, "D": 0, "delta_bias": 0, "out": 1}.get(name)
    return {"x": 3, "dt_weight": 1, "dt_bias": 1, "A": 1, "D": 1, "out": 3}.get(name)


def _cut(name: str, tensor: Tensor, problem: Problem, channels: Tensor, entries: Tensor) -> Tensor:
    if name in (*STREAMS, "out") and len(entries) != problem.case.b:
        tensor = tensor.index_select(0, entries.to(tensor.device))
    axis = channel_axis(name, problem)
    if axis is None or len(channels) == problem.case.d:
        return tensor
    return tensor.index_select(axis, channels.to(tensor.device))
