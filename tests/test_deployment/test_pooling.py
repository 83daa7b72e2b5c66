"""Adaptive pooling as matrix products equals PyTorch's, and is written as ONNX for any size."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmvmamba.deployment.pooling import MatrixPool, with_matrix_pools


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (12, 9), (40, 33), (3, 64)])
@pytest.mark.parametrize("count", [(1, 1), (2, 2), (3, 6), (6, 4)])
def test_equal_to_pytorch(size, count):
    x = torch.randn(2, 3, *size)
    assert torch.allclose(MatrixPool(*count)(x), F.adaptive_avg_pool2d(x, count), atol=1e-6)


def test_only_pools_of_several_pixels_are_replaced():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.AdaptiveAvgPool2d((2, 3)), nn.ReLU())).eval()
    found = with_matrix_pools(model)
    assert type(found[0]) is nn.AdaptiveAvgPool2d and type(found[1][0]) is MatrixPool
    assert type(model[1][0]) is nn.AdaptiveAvgPool2d and not any(part.training for part in found.modules())


def test_onnx_of_any_size(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from mmvmamba.deployment.onnx import compare_onnx, export_onnx

    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.AdaptiveAvgPool2d(6)).eval()
    file = tmp_path / "pool.onnx"
    export_onnx(with_matrix_pools(model), torch.zeros(2, 3, 64, 96), file)
    images = [torch.randn(shape) for shape in ((1, 3, 64, 96), (3, 3, 101, 47), (1, 3, 333, 50))]
    assert max(run.error for run in compare_onnx(model, file, images)) < 1e-5
