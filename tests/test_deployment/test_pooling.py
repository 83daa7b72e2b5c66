"""Adaptive average pooling with the bins of any size: PyTorch's own numbers, in every format."""

import pytest
import torch
from torch import nn

from mmvmamba.deployment.aotinductor import compile_package, load_package
from mmvmamba.deployment.checks import compare, require_equal
from mmvmamba.deployment.onnx import compare_onnx, export_onnx
from mmvmamba.deployment.pooling import average_bins
from mmvmamba.deployment.programs import record

#: Sides below the number of bins, multiples of it, and neither.
SIZES = ((1, 1), (2, 7), (6, 12), (13, 5), (40, 33))


class Pyramid(nn.Module):
    """As in UperNet."""

    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList([nn.AdaptiveAvgPool2d(bins) for bins in (1, 2, 3, 6, (None, 4))])

    def forward(self, image):
        return [pool(image) for pool in self.pools]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", [(1, 1), (2, 2), (3, 3), (6, 6), (4, 5)])
def test_bins_are_pytorch_s(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(average_bins(x, bins), nn.AdaptiveAvgPool2d(bins)(x))


def images():
    return [torch.randn(1 + i % 2, 3, *size) for i, size in enumerate(SIZES[1:])]


def test_a_program_is_good_for_every_size():
    recorded = record(Pyramid().eval(), torch.zeros(2, 3, 10, 14))
    require_equal(compare(Pyramid().eval(), recorded.program.module(), images()), 1e-6)


def test_a_fixed_size_keeps_pytorch_s_operator():
    program = record(Pyramid().eval(), torch.zeros(2, 3, 10, 14), dynamic=("batch",)).program
    assert torch.ops.aten.adaptive_avg_pool2d.default in {node.target for node in program.graph.nodes}


def test_an_onnx_file_is_good_for_every_size(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    report = export_onnx(Pyramid().eval(), torch.zeros(2, 3, 10, 14), tmp_path / "pyramid.onnx")
    assert max(run.error for run in compare_onnx(Pyramid().eval(), report.path, images())) < 1e-6


@pytest.mark.slow
def test_a_package_is_good_for_every_size(tmp_path):
    compile_package(record(Pyramid().eval(), torch.zeros(2, 3, 10, 14)), tmp_path / "pyramid.pt2")
    require_equal(compare(Pyramid().eval(), load_package(tmp_path / "pyramid.pt2"), images()), 1e-6)
