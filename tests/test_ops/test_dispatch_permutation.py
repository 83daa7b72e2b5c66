"""The range of a permutation: read at every call on a CPU, once per tensor on a GPU, never during graph capture."""

from __future__ import annotations

import gc

import pytest
import torch

from mmvmamba.errors import OpInputError
from mmvmamba.ops import scan2d
from mmvmamba.ops.scan2d import orders
from tests.test_ops.test_exact import scan2d_arguments


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU; only the code that reads permutations sees it."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets `OnGPU` pass for a plain tensor, without a GPU; the list grows by one with every read of values."""
    grown: list[int] = []
    read = orders._read_range

    def counting(permutation: torch.Tensor) -> tuple[int, int]:
        grown.append(1)
        return read(permutation.as_subclass(torch.Tensor))

    monkeypatch.setattr(orders, "_read_range", counting)
    monkeypatch.setattr(orders, "Tensor", OnGPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return grown


def test_bad_indices_are_found_after_a_change_in_place() -> None:
    args = scan2d_arguments(2, 3)
    routes = torch.arange(6).expand(4, 6).clone()
    scan2d(*args, orders=routes)
    for value in (6, -1):
        routes[2, 1] = value
        low, high = min(value, 0), max(value, 5)
        with pytest.raises(OpInputError, match=f"pixel indices from {low} to {high}; expected 0 to h . w - 1 = 5"):
            scan2d(*args, orders=routes)
    # PyTorch counts no change through .data or NumPy: on a CPU the values are read every time.
    routes[2, 1] = 1
    scan2d(*args, orders=routes)
    routes.numpy()[3, 3] = 99
    with pytest.raises(OpInputError, match="0 to 99"):
        scan2d(*args, orders=routes)


def test_values_on_a_gpu_are_read_once_per_tensor_and_version(reads: list[int]) -> None:
    routes = torch.arange(6).expand(4, 6).clone().as_subclass(OnGPU)
    for _ in range(5):
        assert orders.pixel_range(routes) == (0, 5)
    assert len(reads) == 1
    routes.add_(1)
    for _ in range(5):
        assert orders.pixel_range(routes) == (1, 6)
    assert len(reads) == 2
    assert orders.pixel_range(torch.arange(3).as_subclass(OnGPU)) == (0, 2)
    assert len(reads) == 3


def test_the_cache_keeps_no_tensor_alive(reads: list[int]) -> None:
    before = len(orders._ranges)
    for size in range(1, 20):
        assert orders.pixel_range(torch.arange(size).as_subclass(OnGPU)) == (0, size - 1)
    gc.collect()
    assert len(orders._ranges) <= before
    assert len(reads) == 19


def test_a_tensor_of_inference_mode_is_read_once(reads: list[int]) -> None:
    with torch.inference_mode():
        routes = torch.arange(4).as_subclass(OnGPU)
        assert orders.pixel_range(routes) == orders.pixel_range(routes) == (0, 3)
    assert len(reads) == 1


def test_who_makes_a_permutation_may_say_its_range(reads: list[int]) -> None:
    routes = torch.arange(6).as_subclass(OnGPU)
    assert orders.remember_range(routes, 0, 5) is routes
    assert orders.pixel_range(routes) == (0, 5)
    assert reads == []
    routes.add_(1)
    assert orders.pixel_range(routes) == (1, 6)
    assert len(reads) == 1


def test_nothing_is_read_while_a_graph_is_captured(reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert orders.pixel_range(torch.arange(4).as_subclass(OnGPU)) is None
    assert reads == []


def test_what_cannot_be_read_is_not() -> None:
    assert orders.pixel_range(torch.arange(4, device="meta")) is None
    assert orders.pixel_range(torch.empty(2, 0, dtype=torch.int64)) is None
    assert orders.pixel_range(torch.tensor([[3, 1], [2, 7]])) == (1, 7)
