"""What must hold of every backend on every device, as functions of both.

``tests/test_gpu`` calls them with a GPU, ``tests/test_ops/test_dispatch_gpu_checks.py`` on a CPU at sizes that fit it,
so that a mistake in a check shows where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from mmvmamba.errors import BackendError
from mmvmamba.ops import CROSS_SCAN, ScanOrder, scan2d, selective_scan, use_backend
from mmvmamba.ops.extension import HAS_EXTENSION
from mmvmamba.testing import FORWARD_BOUND, PARAMETER_GRAD_BOUND, STREAM_GRAD_BOUND, assert_close
from tests.test_ops.samples import SCANS, Sample

# Shapes at which kernels may choose other ways to share the work: (b, h, w, d, k, n, r) of maps, (b, d, l, n, groups)
# of sequences.
MAPS = {
    "one_pixel": (1, 1, 1, 8, 4, 1, 1),
    "small": (1, 4, 5, 96, 4, 1, 6),
    "odd": (3, 57, 43, 100, 4, 1, 7),
    "wide": (1, 200, 304, 96, 4, 1, 6),
    "two_states": (2, 14, 14, 192, 4, 2, 12),
    "sixteen_states": (2, 14, 14, 64, 4, 16, 4),
    "sixty_four_states": (1, 9, 11, 40, 2, 64, 3),
    "many_entries": (96, 3, 5, 32, 4, 1, 2),
    "many_routes": (8, 7, 7, 16, 12, 1, 2),
    "high_rank": (1, 20, 20, 384, 4, 1, 24),
    "many_channels": (1, 2, 3, 70_000, 1, 1, 1),
}
SEQUENCES = {
    "one_position": (3, 33, 1, 1, 1),
    "million": (1, 4, 2**20, 1, 1),
    "many_channels": (1, 70_000, 5, 1, 1),
    "sixteen_states": (2, 96, 700, 16, 1),
    "sixty_four_states": (1, 40, 333, 64, 2),
    "two_states": (2, 48, 130, 2, 4),
}
LOW = (torch.float16, torch.bfloat16)
STREAM_DTYPES = (torch.float32, *LOW)


def map_sample(shape: Sequence[int], dtype: torch.dtype, orders: object = None) -> Sample:
    """Arguments of `scan2d` on one of `MAPS`."""
    b, h, w, d, k, n, r = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def make(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator) * scale

    return Sample(
        op=scan2d,
        tensors={
            "x": make(b, h, w, d).to(dtype),
            "projections": make(b, h, w, k, r + 2 * n).to(dtype),
            "dt_weight": make(k, d, r, scale=r**-0.5),
            "dt_bias": make(k, d, scale=0.5),
            "A": -torch.rand(k, d, n, generator=generator) * 2,
            "D": make(k, d),
        },
        options={
            "orders": tuple(CROSS_SCAN[i % 4] for i in range(k)) if orders is None else orders,
            "delta_softplus": True,
            "out_dtype": torch.float32 if dtype in LOW else None,
        },
        streams=("x", "projections"),
        dtype=dtype,
    )


def sequence_sample(shape: Sequence[int], dtype: torch.dtype) -> Sample:
    """Arguments of `selective_scan` on one of `SEQUENCES`."""
    b, d, length, n, groups = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def make(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator) * scale

    return Sample(
        op=selective_scan,
        tensors={
            "u": make(b, d, length).to(dtype),
            "delta": make(b, d, length).to(dtype),
            "A": -torch.rand(d, n, generator=generator) * 2,
            "B": make(b, groups, n, length).to(dtype),
            "C": make(b, groups, n, length).to(dtype),
            "D": make(d),
            "delta_bias": make(d, scale=0.5),
        },
        options={"delta_softplus": True, "out_dtype": torch.float32 if dtype in LOW else None},
        streams=("u", "delta", "B", "C"),
        dtype=dtype,
    )


def on(sample: Sample, device: str) -> Sample:
    """The same sample with its tensors, the permutation too, on a device."""
    tensors = {name: None if value is None else value.to(device) for name, value in sample.tensors.items()}
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in sample.options.items()}
    return dataclasses.replace(sample, tensors=tensors, options=options)


def forward_backward(sample: Sample, backend: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients where the sample is; the gradient of the output is the same on every device."""
    leaves = {
        name: None if value is None else value.detach().requires_grad_() for name, value in sample.tensors.items()
    }
    out = sample.run(backend, leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights.to(sample.options.get("out_dtype") or sample.dtype).to(out.device, out.dtype)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    return out.detach(), dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), weights), strict=True))


def check_against_float64(sample: Sample, device: str, backend: str) -> None:
    """Output and gradients against the CPU in float64: the compiled kernels, since the reference takes minutes."""
    moved = on(sample, device)
    if device != "cpu" and sample.dtype == torch.float64 and backend != "reference":
        with pytest.raises(BackendError, match="float64"):
            forward_backward(moved, backend)
        return
    expected_out, expected = sample.gradients("compiled" if HAS_EXTENSION else "reference", double=True)
    out, grads = forward_backward(moved, backend)
    assert_close("out", out.cpu(), expected_out, FORWARD_BOUND[sample.dtype])
    for name, grad in grads.items():
        bounds = STREAM_GRAD_BOUND if name in sample.streams else PARAMETER_GRAD_BOUND
        assert_close(f"gradient of {name}", grad.cpu(), expected[name], bounds[sample.dtype])


def bits(value: Tensor) -> Tensor:
    """The tensor as integers, so that NaN is equal to the same NaN."""
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.contiguous().view(views[value.itemsize])


def check_repeats(sample: Sample, device: str, backend: str, runs: int) -> None:
    """Every run gives the bits of the first, also at other addresses."""
    moved = on(sample, device)
    first_out, first = forward_backward(moved, backend)
    for run in range(runs):
        scrap = torch.full((1 + 997 * (run % 7),), float(run), device=device)
        out, grads = forward_backward(moved, backend)
        assert torch.equal(bits(out), bits(first_out)), f"run {run}: out"
        for name, grad in grads.items():
            assert torch.equal(bits(grad), bits(first[name])), f"run {run}: gradient of {name}"
        del scrap


def check_no_growth(sample: Sample, device: str, backend: str, calls: int) -> None:
    """Calls leave nothing behind: allocated bytes of the device, or tensors alive on a CPU."""

    def held() -> int:
        gc.collect()
        if device == "cpu":
            return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)

    moved = on(sample, device)
    for _ in range(3):
        forward_backward(moved, backend)
    before = held()
    for _ in range(calls):
        forward_backward(moved, backend)
    # Fewer is possible: what earlier tests left behind may go meanwhile.
    assert held() <= before


def check_isolation(device: str, backend: str, poison: float) -> None:
    """A value that is not finite reaches later positions of its own channel and entry, and nothing else."""
    b, d, length, at = 3, 70, 200, 77
    sample = on(sequence_sample((b, d, length, 2, 1), torch.float32), device)
    with torch.no_grad():
        clean = sample.run(backend)
        sample.tensors["u"][1, 5, at] = poison
        dirty = sample.run(backend)
    touched = torch.zeros(b, d, length, dtype=torch.bool, device=device)
    touched[1, 5, at:] = True
    assert torch.equal(clean[~touched], dirty[~touched])
    assert not dirty[1, 5, at].isfinite()

    h, w = 10, 20
    sample = on(map_sample((b, h, w, d, 1, 1, 3), torch.float32, orders=(ScanOrder.ROW_REVERSED,)), device)
    with torch.no_grad():
        clean = sample.run(backend)
        sample.tensors["x"][2].view(h * w, d)[at, 9] = poison
        dirty = sample.run(backend)
    touched = torch.zeros(b, h * w, d, dtype=torch.bool, device=device)
    touched[2, : at + 1, 9] = True
    touched = touched.view(b, h, w, d)
    assert torch.equal(clean[~touched], dirty[~touched])
    assert not dirty.view(b, h * w, d)[2, at, 9].isfinite()


def check_far_offsets(device: str, backend: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """The last entry of a large batch gets what it gets alone, though its elements lie far from the first."""
    b, h, w, d = shape
    generator = torch.Generator(device).manual_seed(5)

    def make(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    parameters = (torch.ones(1, d, 1, device=device), torch.zeros(1, d, device=device),
                  -torch.ones(1, d, 1, device=device), torch.ones(1, d, device=device))  # fmt: skip

    def run(x: Tensor, projections: Tensor) -> list[Tensor]:
        x, projections = x.detach().requires_grad_(), projections.detach().requires_grad_()
        out = scan2d(x, projections, *parameters, orders=(ScanOrder.COLUMN,), backend=backend)
        grads = torch.autograd.grad(out, (x, projections), torch.ones_like(out))
        return [value[-1:].clone() for value in (out.detach(), *grads)]

    x, projections = make(b, h, w, d), make(b, h, w, 1, 3)
    alone = run(x[-1:].clone(), projections[-1:].clone())
    for name, whole, one in zip(("out", "dx", "dprojections"), run(x, projections), alone, strict=True):
        assert_close(name, whole, one, STREAM_GRAD_BOUND[dtype])


def check_deterministic_mode(sample: Sample, device: str, backend: str) -> None:
    """Nothing complains under ``use_deterministic_algorithms``, which also fills new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out, grads = forward_backward(on(sample, device), backend)
    finally:
        torch.use_deterministic_algorithms(before)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())


def features(device: str, backend: str | None) -> list[Tensor]:
    """Feature maps of a seeded VMamba nano."""
    from mmvmamba.models import VMamba

    torch.manual_seed(0)
    model = VMamba(arch="nano").eval()
    image = torch.randn(1, 3, 65, 97)
    with torch.no_grad(), use_backend(backend):
        return [out.cpu() for out in model.to(device)(image.to(device))]


def losses_of_training(device: str, dtype: torch.dtype, steps: int) -> list[float]:
    """Train VMamba nano with a linear head under autocast on one batch; return the losses."""
    from mmvmamba.models import VMamba

    torch.manual_seed(0)
    model = VMamba(arch="nano").train()
    image = torch.randn(4, 3, 64, 96)
    head = nn.Linear(model(image)[-1].shape[1], 10)
    net = nn.ModuleList([model, head]).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    labels = torch.arange(4, device=device)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            logits = head(model(image.to(device))[-1].mean((2, 3)))
            loss = nn.functional.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def losses_of_detector_training(device: str, dtype: torch.dtype, steps: int, config: str) -> list[float]:
    """Train the digits Mask R-CNN on made-up pictures under mmengine's AMP wrapper, ours on a CPU."""
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.optim import AmpOptimWrapper

    from mmvmamba.engine.optimizers import Bfloat16OptimWrapper

    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(config)
    cfg.model.backbone.pop("init_cfg")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if device == "cpu":
        wrapper = Bfloat16OptimWrapper(optimizer=optimizer)
    else:
        wrapper = AmpOptimWrapper(optimizer=optimizer, dtype=str(dtype).removeprefix("torch."))
    losses = []
    for _ in range(steps):
        data = demo_mm_inputs(2, image_shapes=[(3, 96, 128)] * 2, num_items=[3, 3], num_classes=10, with_mask=True)
        values = model.train_step(data, wrapper)
        losses.append(values["loss"].item())
    return losses


def configurations(count: int) -> list[Sample]:
    """Small samples of both scans in every stream dtype, for tools that slow kernels down a hundredfold."""
    made: list[Sample] = []
    makers: list[Callable[[int], Sample]] = list(SCANS.values())
    seed = 0
    while len(made) < count:
        sample = makers[seed % len(makers)](3000 + seed)
        seed += 1
        if sample.dtype != torch.float64:
            made.append(sample)
    return made
