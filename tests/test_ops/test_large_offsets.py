"""Element offsets beyond 2^31 (reliability matrix A8): strided views of a sparse file; few pages are touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmvmamba.testing import assert_close, requires_extension
from tests.test_ops.samples import MAKERS, Sample
from tests.test_ops.test_exact import single_route_sample

# Reading touches whole pages of the file; this is far below what the file would take if it were not sparse.
MOST_BYTES_ON_DISK = 64 * 2**20


def spread_out(value: Tensor, path: Path) -> Tensor:
    """The same numbers with the first axis longer than one spread over a file; the last offset is beyond 2^31."""
    axis = next((axis for axis, size in enumerate(value.shape) if size > 1), 0)
    steps = max(value.shape[axis] - 1, 1)
    jump = 2**31 // steps + 64
    dense = list(torch.empty(value.shape).stride())
    strides = [jump if i == axis else stride for i, stride in enumerate(dense)]
    count = 1 + steps * jump + sum((size - 1) * stride for size, stride in zip(value.shape, dense, strict=True))
    with path.open("wb") as file:
        file.truncate(count * value.element_size())
    flat = torch.from_file(str(path), shared=True, size=count, dtype=value.dtype)
    view = flat.as_strided(value.shape, strides, count - 1 - _last(value.shape, strides))
    view.copy_(value)
    assert view.storage_offset() + _last(view.shape, view.stride()) > 2**31
    return view


def _last(shape: torch.Size, strides: list[int] | tuple[int, ...]) -> int:
    """Offset of the last element from the first."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A place for a file of many GiB that takes next to none; fails where the file system cannot do that."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**35)
    assert path.stat().st_blocks * 512 < 2**20, f"{tmp_path} cannot hold sparse files: set another TMPDIR"
    yield path
    path.unlink()


def check(sample: Sample, name: str, path: Path) -> None:
    """Compare one input that is spread out with its compact copy, forward and backward."""
    compact = {key: None if value is None else value.contiguous() for key, value in sample.tensors.items()}
    spread = dict(compact)
    spread[name] = spread_out(compact[name], path)
    found = [
        Sample(sample.op, tensors, sample.options, sample.streams, sample.dtype).gradients("compiled")
        for tensors in (compact, spread)
    ]
    (out, grads), (out_spread, grads_spread) = found
    # The gate z is applied by PyTorch's own silu, which takes another path for another memory layout.
    bound = 0.0 if name != "z" else 1e-6 if sample.dtype == torch.float32 else 1e-2
    assert_close("out", out_spread, out, bound)
    for key, grad in grads.items():
        assert_close(f"gradient of {key}", grads_spread[key], grad, bound)
    assert path.stat().st_blocks * 512 < MOST_BYTES_ON_DISK


def complete_sample(make: Callable[[int], Sample], dtype: torch.dtype) -> Sample:
    """The first sample of a type that has every optional argument and more than one of everything."""
    samples = (make(seed) for seed in range(1000))
    return next(
        sample
        for sample in samples
        if sample.dtype == dtype and all(value is not None and value.numel() > 1 for value in sample.tensors.values())
    )


CASES = [(op, name) for op, make in MAKERS.items() for name in make(0).tensors]


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize(("op", "name"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_input_in_turn(op: str, name: str, dtype: torch.dtype, path: Path) -> None:
    check(complete_sample(MAKERS[op], dtype), name, path)


@requires_extension()
@pytest.mark.ext
def test_the_permutation_of_scan2d(path: Path) -> None:
    sample = single_route_sample(3)[0]
    out, grads = sample.gradients("compiled")
    routes = sample.options["orders"]
    assert isinstance(routes, Tensor)
    sample.options["orders"] = spread_out(routes, path)
    out_spread, grads_spread = sample.gradients("compiled")
    assert torch.equal(out, out_spread)
    assert all(torch.equal(grad, grads_spread[key]) for key, grad in grads.items())


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("op", MAKERS)
def test_the_gradient_of_the_output(op: str, path: Path) -> None:
    sample = complete_sample(MAKERS[op], torch.float32)
    leaves = {key: value.detach().requires_grad_() for key, value in sample.tensors.items()}
    out = sample.run("compiled", leaves)
    weights = torch.randn(out.shape)
    compact = torch.autograd.grad(out, list(leaves.values()), weights, retain_graph=True)
    spread = torch.autograd.grad(out, list(leaves.values()), spread_out(weights, path))
    assert all(torch.equal(one, other) for one, other in zip(compact, spread, strict=True))
