"""The operators on a GPU, with every backend: ``make test-gpu``."""

from __future__ import annotations

import pytest
import torch

from mmvmamba.ops import available_backends, scan2d, selective_scan
from tests import gpu_checks
from tests.test_ops.samples import SCANS

pytestmark = pytest.mark.gpu

REPEATS = 250
CALLS = 200


def test_every_backend_can_run_here() -> None:
    """What cannot is left out of the other tests, which must not pass for success."""
    missing = {name: status.reason for name, status in available_backends("cuda").items() if not status.available}
    assert missing == {}


@pytest.mark.parametrize("make", SCANS.values(), ids=SCANS)
@pytest.mark.parametrize("seed", range(40))
def test_random_samples(make, seed: int, backend: str) -> None:
    gpu_checks.check_against_float64(make(seed), "cuda", backend)


@pytest.mark.parametrize("dtype", gpu_checks.STREAM_DTYPES, ids=str)
@pytest.mark.parametrize("shape", gpu_checks.MAPS.values(), ids=gpu_checks.MAPS)
def test_maps(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    if backend == "reference" and shape[1] * shape[2] > 5000:
        pytest.skip("plain PyTorch takes minutes for this map")
    gpu_checks.check_against_float64(gpu_checks.map_sample(shape, dtype), "cuda", backend)


@pytest.mark.parametrize("dtype", gpu_checks.STREAM_DTYPES, ids=str)
@pytest.mark.parametrize("shape", gpu_checks.SEQUENCES.values(), ids=gpu_checks.SEQUENCES)
def test_sequences(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    if backend == "reference" and shape[2] > 5000:
        pytest.skip("plain PyTorch takes minutes for this length")
    gpu_checks.check_against_float64(gpu_checks.sequence_sample(shape, dtype), "cuda", backend)


@pytest.mark.parametrize("number", range(12))
def test_repeats_are_bitwise_equal(number: int, backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch promises what PyTorch's own operators do")
    gpu_checks.check_repeats(gpu_checks.configurations(12)[number], "cuda", backend, REPEATS)


@pytest.mark.parametrize("number", range(4))
def test_memory_stays(number: int, backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch keeps nothing of ours, and takes minutes for these calls")
    gpu_checks.check_no_growth(gpu_checks.configurations(4)[number], "cuda", backend, CALLS)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_where_it_belongs(poison: float, backend: str) -> None:
    gpu_checks.check_isolation("cuda", backend, poison)


@pytest.mark.slow
def test_offsets_beyond_31_bits(backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch would keep every step of 2.3e9 elements in float32")
    if torch.cuda.mem_get_info()[1] < 60 * 2**30:
        pytest.skip("needs a GPU with 60 GiB of memory")
    gpu_checks.check_far_offsets("cuda", backend, (16, 512, 512, 544), torch.bfloat16)


@pytest.mark.parametrize("number", range(6))
def test_deterministic_mode_is_clean(number: int, backend: str) -> None:
    gpu_checks.check_deterministic_mode(gpu_checks.configurations(6)[number], "cuda", backend)


def test_tensors_on_two_devices_are_refused() -> None:
    u = torch.randn(1, 4, 5, device="cuda")
    with pytest.raises(ValueError, match="argument 'B' is on cpu"):
        selective_scan(u, u, -torch.rand(4, 2, device="cuda"), torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    with pytest.raises(ValueError, match="is on cpu"):
        scan2d(torch.randn(1, 2, 2, 4, device="cuda"), torch.randn(1, 2, 2, 1, 3), torch.randn(1, 4, 1), None,
               -torch.rand(1, 4, 1), orders=torch.arange(4)[None])  # fmt: skip


def test_calls_do_not_wait_for_the_gpu(backend: str) -> None:
    """Not even with a permutation, once it has been seen."""
    routes = torch.stack([torch.randperm(63) for _ in range(4)])
    sample = gpu_checks.on(gpu_checks.map_sample((2, 7, 9, 40, 4, 1, 3), torch.float32, orders=routes), "cuda")
    gpu_checks.forward_backward(sample, backend)
    leaves = {name: value.detach().requires_grad_() for name, value in sample.tensors.items()}
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sample.run(backend, leaves)
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("permuted", [False, True], ids=["orders", "permutation"])
def test_graph_capture_and_replay(permuted: bool, backend: str) -> None:
    routes = torch.stack([torch.randperm(63) for _ in range(4)]) if permuted else None
    sample = gpu_checks.on(gpu_checks.map_sample((2, 7, 9, 40, 4, 1, 3), torch.float32, orders=routes), "cuda")
    leaves = {name: value.detach().requires_grad_() for name, value in sample.tensors.items()}
    weights = torch.randn(2, 7, 9, 40, device="cuda")

    def step() -> list[torch.Tensor]:
        out = sample.run(backend, leaves)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), weights)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            leaves["x"].normal_()
            leaves["projections"].normal_()
        graph.replay()
        for have, want in zip(captured, step(), strict=True):
            if backend == "reference":
                gpu_checks.assert_close("replayed", have, want, 1e-5)
            else:
                assert torch.equal(gpu_checks.bits(have), gpu_checks.bits(want))
