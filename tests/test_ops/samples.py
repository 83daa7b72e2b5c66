"""Random operator arguments: the seed is the index of a sample, so every sample can be made again by itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmvmamba.ops import (
    BIDIRECTIONAL_SCAN,
    CROSS_SCAN,
    UNIDIRECTIONAL_SCAN,
    ScanOrder,
    scan2d,
    selective_scan,
    ssd,
    ssd_non_causal,
)

Op = Callable[..., Tensor]
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Lengths around the kernel's chunk (32) and vector widths, and odd ones.
LENGTHS = (1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 97, 128, 257, 1023, 4097)
# What the state of the reference may hold: it keeps every step.
LARGEST_STATE = 400_000


@dataclass
class Sample:
    """Arguments of one call: tensors in the order of the operator, options, and which tensors are per position."""

    op: Op
    tensors: dict[str, Tensor | None]
    options: dict[str, object]
    streams: tuple[str, ...]
    dtype: torch.dtype

    def run(self, backend: str | None, tensors: dict[str, Tensor | None] | None = None) -> Tensor:
        return self.op(**(self.tensors if tensors is None else tensors), **self.options, backend=backend)

    def gradients(
        self, backend: str | None, double: bool = False, autocast: torch.dtype | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and all gradients, for a fixed random gradient of the output; in float64 if ``double``.

        With ``autocast`` the forward runs under it, as PyTorch recommends.
        """
        leaves = {
            name: None if value is None else as_leaf(value.double() if double else value)
            for name, value in self.tensors.items()
        }
        options = self.options | ({"out_dtype": torch.float64} if double else {})
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = self.op(**leaves, **options, backend=backend)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        weights = weights.to(self.options.get("out_dtype") or self.dtype).to(out.dtype)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        grads = torch.autograd.grad(out, list(wanted.values()), weights)
        return out.detach(), dict(zip(wanted, grads, strict=True))


def as_leaf(value: Tensor) -> Tensor:
    """A leaf with the strides of ``value``."""
    return value.detach().requires_grad_()


def _strided(value: Tensor, pick: random.Random) -> Tensor:
    """The same numbers in another memory layout."""
    kind = pick.choice(("contiguous", "contiguous", "transposed", "offset", "padded", "expanded"))
    if kind == "expanded" and value.dim() >= 2 and value.shape[0] > 1:
        return value[:1].expand(value.shape)
    if kind == "transposed" and value.dim() >= 2:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "offset":
        return torch.cat([value.new_full((3,), float("nan")), value.reshape(-1)])[3:].view(value.shape)
    if kind == "padded" and value.dim() >= 1:
        padded = value.new_full((*value.shape[:-1], value.shape[-1] + 2), float("nan"))
        padded[..., :-2] = value
        return padded[..., :-2]
    return value


def _dtypes(pick: random.Random) -> tuple[torch.dtype, torch.dtype]:
    """Of the per-position tensors, and of the parameters."""
    dtype = pick.choice(DTYPES)
    return dtype, torch.float64 if dtype == torch.float64 else torch.float32


def selective_scan_sample(seed: int) -> Sample:
    pick = random.Random(seed)  # noqa: S311
    generator = torch.Generator().manual_seed(seed)
    dtype, parameter_dtype = _dtypes(pick)
    b, groups, n = pick.randint(1, 4), pick.choice((1, 1, 2, 4)), pick.choice((1, 2, 4, 8, 16, 64))
    d = groups * pick.randint(1, max(1, 96 // groups))
    length = pick.choice(LENGTHS)
    while b * d * n * length > LARGEST_STATE:
        b, length = max(1, b - 1), max(1, length // 2)

    def make(*shape: int, scale: float = 1.0, low: bool = True) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return _strided(value.to(dtype if low else parameter_dtype), pick)

    grouped = groups > 1 or pick.random() < 0.5
    projection = (b, groups, n, length) if grouped else (b, n, length)
    softplus = pick.random() < 0.7
    delta = (
        make(b, d, length) if softplus else _strided((torch.rand(b, d, length, generator=generator)).to(dtype), pick)
    )
    rates = -torch.rand(d, n, generator=generator, dtype=torch.float64).to(parameter_dtype) * 2
    return Sample(
        op=selective_scan,
        tensors={
            "u": make(b, d, length),
            "delta": delta,
            "A": _strided(rates, pick),
            "B": make(*projection),
            "C": make(*projection),
            "D": make(d, low=False) if pick.random() < 0.7 else None,
            "delta_bias": make(d, scale=0.5, low=False) if softplus and pick.random() < 0.7 else None,
            "z": make(b, d, length) if pick.random() < 0.3 else None,
        },
        options={
            "delta_softplus": softplus,
            "out_dtype": torch.float32 if dtype in HALF and pick.random() < 0.5 else None,
        },
        streams=("u", "delta", "B", "C", "z"),
        dtype=dtype,
    )


def scan2d_sample(seed: int) -> Sample:
    pick = random.Random(10_000 + seed)  # noqa: S311
    generator = torch.Generator().manual_seed(10_000 + seed)
    dtype, parameter_dtype = _dtypes(pick)
    b, n, r = pick.randint(1, 3), pick.choice((1, 1, 1, 2, 4, 16)), pick.choice((1, 2, 3, 6, 12, 24))
    d = pick.choice((1, 3, 8, 16, 17, 33, 48, 64, 65, 96, 100))
    h, w = pick.choice((1, 2, 5, 7, 8, 13, 33)), pick.choice((1, 3, 4, 7, 8, 11, 32))
    orders, k = _orders(pick, generator, h, w)
    while b * k * d * n * h * w > LARGEST_STATE:
        b, d = max(1, b - 1), max(1, d // 2)

    def make(*shape: int, scale: float = 1.0, low: bool = True) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return _strided(value.to(dtype if low else parameter_dtype), pick)

    softplus = pick.random() < 0.8
    of_each_route = (k,) if pick.random() < 0.3 else ()
    rates = -torch.rand(k, d, n, generator=generator, dtype=torch.float64).to(parameter_dtype) * 2
    return Sample(
        op=scan2d,
        tensors={
            "x": make(b, h, w, *of_each_route, d),
            # Without softplus a step size may be negative, and the state grows: keep it small.
            "projections": make(b, h, w, k, r + 2 * n, scale=1.0 if softplus else 0.3),
            "dt_weight": make(k, d, r, scale=r**-0.5 if softplus else 0.3 * r**-0.5, low=False),
            "dt_bias": make(k, d, scale=0.5, low=False) if softplus and pick.random() < 0.8 else None,
            "A": _strided(rates, pick),
            "D": make(k, d, low=False) if pick.random() < 0.8 else None,
        },
        options={"orders": orders, "delta_softplus": softplus, "out_dtype": pick.choice((None, None, torch.float32))}
        if dtype != torch.float64
        else {"orders": orders, "delta_softplus": softplus, "out_dtype": None},
        streams=("x", "projections"),
        dtype=dtype,
    )


def _orders(
    pick: random.Random, generator: torch.Generator, h: int, w: int
) -> tuple[tuple[ScanOrder, ...] | Tensor, int]:
    kind = pick.choice(
        ("cross", "cross", "bidirectional", "unidirectional", "single", "permutation", "partial", "repeats")
    )
    if kind == "cross":
        return CROSS_SCAN, 4
    if kind == "bidirectional":
        return BIDIRECTIONAL_SCAN, 4
    if kind == "unidirectional":
        return UNIDIRECTIONAL_SCAN, 4
    if kind == "single":
        return (pick.choice(list(ScanOrder)),), 1
    k = pick.randint(1, 4)
    routes = torch.stack([torch.randperm(h * w, generator=generator) for _ in range(k)])
    if kind == "repeats":  # more visits than pixels
        return torch.randint(h * w, (k, h * w + 3), generator=generator), k
    if kind == "partial":
        return routes[:, : max(1, h * w // 4)], k
    return routes, k


@dataclass
class _Mixer:
    """Random sizes of a mixer of state space duality, and tensors of them."""

    pick: random.Random
    generator: torch.Generator

    def __post_init__(self) -> None:
        pick = self.pick
        self.dtype, self.parameter_dtype = _dtypes(pick)
        self.groups = pick.choice((1, 1, 1, 2, 3))
        self.b, self.k = pick.randint(1, 3), self.groups * pick.choice((1, 2, 3, 4))
        # Around widths of vectors and blocks of rows of the kernels (6, 48), ranges (96, 240) and chunks (64).
        self.p, self.n = (
            pick.choice((1, 3, 8, 16, 17, 32, 48, 64, 65)),
            pick.choice((1, 2, 5, 8, 16, 25, 33, 48, 64, 65)),
        )
        self.length = pick.choice((1, 2, 5, 6, 7, 47, 48, 49, 63, 64, 65, 95, 97, 128, 130, 241, 500))
        while self.b * self.k * self.p * self.n * self.length > 4 * LARGEST_STATE:
            self.b, self.length, self.p = max(1, self.b - 1), max(1, self.length * 2 // 3), max(1, self.p - 5)

    def stream(self, *shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return _strided(value.to(self.dtype), self.pick)

    def parameter(self, *shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return _strided(value.to(self.parameter_dtype), self.pick)

    def projection(self) -> Tensor:
        return self.stream(self.b, self.length, self.groups, self.n)

    def skip(self) -> Tensor | None:
        return self.parameter(self.k) if self.pick.random() < 0.7 else None

    def options(self) -> dict[str, object]:
        return {
            "head_groups": self.pick.choice(("interleaved", "blocked")),
            "out_dtype": torch.float32 if self.dtype in HALF and self.pick.random() < 0.5 else None,
        }


def ssd_non_causal_sample(seed: int) -> Sample:
    make = _Mixer(random.Random(20_000 + seed), torch.Generator().manual_seed(20_000 + seed))  # noqa: S311
    return Sample(
        op=ssd_non_causal,
        tensors={
            "x": make.stream(make.b, make.length, make.k, make.p),
            "weight": make.stream(make.b, make.length, make.k) if make.pick.random() < 0.8 else None,
            "b_in": make.projection(),
            "c_out": make.projection(),
            "skip": make.skip(),
        },
        options=make.options(),
        streams=("x", "weight", "b_in", "c_out"),
        dtype=make.dtype,
    )


def ssd_sample(seed: int) -> Sample:
    make = _Mixer(random.Random(30_000 + seed), torch.Generator().manual_seed(30_000 + seed))  # noqa: S311
    softplus = make.pick.random() < 0.7
    dt = make.stream(make.b, make.length, make.k)
    rates = torch.rand(make.k, generator=make.generator, dtype=torch.float64) * make.pick.choice((0.05, 1.0, 8.0))
    return Sample(
        op=ssd,
        tensors={
            "x": make.stream(make.b, make.length, make.k, make.p),
            # Without softplus a step size may not be negative: the state would grow without bound.
            "dt": dt if softplus else dt.abs(),
            "decay": -rates.to(make.parameter_dtype),
            "b_in": make.projection(),
            "c_out": make.projection(),
            "skip": make.skip(),
            "dt_bias": make.parameter(make.k, scale=0.5) if softplus and make.pick.random() < 0.7 else None,
            "initial_state": make.parameter(make.b, make.k, make.n, make.p) if make.pick.random() < 0.5 else None,
        },
        options=make.options() | {"dt_softplus": softplus},
        streams=("x", "dt", "b_in", "c_out"),
        dtype=make.dtype,
    )


SCANS: dict[str, Callable[[int], Sample]] = {"selective_scan": selective_scan_sample, "scan2d": scan2d_sample}
"""The makers of the operators that have CUDA kernels."""
MAKERS: dict[str, Callable[[int], Sample]] = SCANS | {"ssd_non_causal": ssd_non_causal_sample, "ssd": ssd_sample}
"""Every operator's maker of samples; the tests of what all operators promise go through these."""
