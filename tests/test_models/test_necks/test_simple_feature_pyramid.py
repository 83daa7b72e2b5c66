"""The pyramids of maps of one resolution: sizes, odd sides, restated levels, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.errors import ConfigError, OpInputError
from mmvmamba.models import FourScalePyramid, SimpleFeaturePyramid
from mmvmamba.registry import MODELS


@pytest.mark.parametrize("side", [(1, 1), (1, 5), (4, 7), (8, 8)], ids=str)
def test_sizes(side):
    rows, columns = side
    x = torch.randn(2, 8, rows, columns)
    halves = tuple(max(n // 2, 1) for n in side)
    outs = SimpleFeaturePyramid([8], 6, num_outs=6)([x])
    sizes = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), side, halves]
    for _ in range(2):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    assert [out.shape for out in outs] == [(2, 6, *size) for size in sizes]
    outs = FourScalePyramid(8)([x] * 4)
    assert [out.shape for out in outs] == [(2, 8, *size) for size in sizes[:4]]
    finer = FourScalePyramid(8, stride=8)([x] * 4)
    quarter = tuple(max(n // 4, 1) for n in side)
    assert [out.shape[2:] for out in finer] == [sizes[1], side, halves, quarter]
    sum(out.square().mean() for out in (*outs, *finer)).backward()


def test_levels_restated():
    neck = SimpleFeaturePyramid(8, 6).double()
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64)

    def norm(y, layer):
        mean, var = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
        return (y - mean) / (var + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]

    def convs(y, one, three):
        y = norm(F.conv2d(y, one.weight), one.norm)
        return norm(F.conv2d(y, three.weight, padding=1), three.norm)

    up = neck.simfp_2
    finest = F.conv_transpose2d(x, up[0].weight, up[0].bias, 2)
    finest = F.conv_transpose2d(F.gelu(norm(finest, up[1])), up[3].weight, up[3].bias, 2)
    outs = neck([x])
    torch.testing.assert_close(outs[0], convs(finest, up[4], up[5]))
    torch.testing.assert_close(outs[3], convs(F.max_pool2d(x, 2), neck.simfp_5[1], neck.simfp_5[2]))
    torch.testing.assert_close(outs[4], outs[3][:, :, ::2, ::2])


def test_fewer_maps_and_a_synchronised_norm():
    neck = FourScalePyramid([8, 8], norm="sync_batch_norm")
    assert isinstance(neck.fpn1[1], torch.nn.SyncBatchNorm)
    assert len(neck.eval()([torch.randn(1, 8, 3, 3)] * 2)) == 2
    x = torch.randn(1, 8, 4, 6)
    assert all(torch.equal(out, same) for out, same in zip(neck([x]), neck([x] * 4), strict=True))


def test_a_head_of_another_library_has_the_norm_by_name():
    pytest.importorskip("mmcv")
    from mmcv.cnn import build_norm_layer

    name, norm = build_norm_layer(dict(type="mmvmamba.ChannelNorm", eps=1e-6), 5)
    assert norm.eps == 1e-6 and name.startswith("ln")
    out = norm(torch.randn(2, 5, 3, 4))
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)


def test_bad_arguments():
    for neck, options, match in (
        ("SimpleFeaturePyramid", dict(in_channels=6), "in_channels is 6, expected a multiple of 4"),
        ("SimpleFeaturePyramid", dict(in_channels=[8, 16]), r"in_channels is \[8, 16\]"),
        ("SimpleFeaturePyramid", dict(in_channels=8, num_outs=3), "num_outs is 3"),
        ("FourScalePyramid", dict(in_channels=8, stride=4), "stride is 4, expected 8 or 16"),
        ("FourScalePyramid", dict(in_channels=8, norm="bn"), "norm is 'bn'"),
        ("FourScalePyramid", dict(in_channels=[]), r"in_channels is \[\]"),
    ):
        with pytest.raises(ConfigError, match=match):
            MODELS.build(dict(type=neck, **options))
    with pytest.raises(OpInputError, match="got 2 maps, expected one"):
        SimpleFeaturePyramid(8)([torch.randn(1, 8, 2, 2)] * 2)
    with pytest.raises(OpInputError, match="got 5 maps"):
        FourScalePyramid(8)([torch.randn(1, 8, 2, 2)] * 5)
