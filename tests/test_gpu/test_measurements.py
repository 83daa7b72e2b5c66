"""Speed, memory and operations on a GPU, against what is known of the models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmvmamba.analysis.environment import device_facts
from mmvmamba.analysis.flop_passes import count_backbone_passes
from mmvmamba.analysis.memory import how_measured, peak_of
from mmvmamba.analysis.throughput import Settings, Subject, measure
from mmvmamba.models.backbones import VMamba

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
MIB = 1 << 20


class Products(nn.Module):
    """Enough work that the host is done long before the GPU."""

    def forward(self, x: Tensor) -> Tensor:
        square = torch.ones(8192, 8192, device=x.device)
        for _ in range(10):
            square = square @ square * 1e-4
        return square


def test_the_clock_waits_for_the_gpu() -> None:
    subject = Subject("products", module := Products(), module)
    (found,) = measure([subject], torch.randn(1, 3, 8, 8, device=CUDA), Settings(device=CUDA, seconds=0.0))
    # 10 products of 2 x 8192^3 operations; no GPU does a quadrillion float32 operations in a second.
    assert found.minimum is not None and found.minimum > 10 * 2 * 8192**3 / 1e15


@pytest.mark.parametrize("mebibytes", [16, 256])
def test_memory_is_what_is_allocated(mebibytes: int) -> None:
    kept = torch.ones(MIB, device=CUDA)
    peak = peak_of(lambda: torch.ones(mebibytes * MIB, dtype=torch.uint8, device=CUDA), CUDA)
    assert peak == mebibytes * MIB and kept.is_cuda
    assert "max_memory_allocated" in how_measured(CUDA) and "capability" in device_facts(CUDA)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_backbone_is_measured_in_both_passes(dtype: str) -> None:
    model = VMamba("nano").to(CUDA)
    settings = Settings(dtype, CUDA, seconds=0.5)
    images = torch.randn(4, 3, 224, 224, device=CUDA)
    for train in (False, True):
        (found,) = measure([Subject("nano", model, model)], images, settings, train=train)
        assert not found.problem and found.rounds is not None and found.rounds >= 3
        assert found.step_bytes is not None and found.step_bytes > images.nbytes


def test_operations_are_counted_of_a_model_on_the_gpu() -> None:
    here, there = (count_backbone_passes(VMamba("nano").to(device), 64, 64) for device in (CUDA, "cpu"))
    assert here == there
