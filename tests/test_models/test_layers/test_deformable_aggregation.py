"""Deformable aggregation: the same numbers from bags of rows as from torchvision's operator, at any place and type."""

import sys

import pytest
import torch
from torch import nn

from mmvmamba.errors import BackendError, ConfigError
from mmvmamba.models.layers import deformable_aggregation as module
from mmvmamba.models.layers.deformable_aggregation import (
    DeformableAggregation,
    aggregate_by_bags,
    aggregate_by_convolution,
    deformable_aggregation,
)
from mmvmamba.models.layers.mixed_depthwise import MixedDepthwise


def _inputs(shape, groups, scale=1.0, dtype=torch.float64):
    """Return a map and numbers whose places are nowhere near a jump of the gradient."""
    torch.manual_seed(0)
    b, h, w, _ = shape
    x = torch.randn(shape, dtype=dtype)
    numbers = scale * torch.randn(b, h, w, 27 * groups + 5, dtype=dtype)
    fraction = numbers - numbers.floor()
    numbers = numbers.floor() + 0.1 + 0.8 * fraction
    return x.requires_grad_(), numbers.requires_grad_()


def _gradients(y, *inputs):
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), inputs)


@pytest.mark.parametrize("scale", [0.5, 4.0, 50.0])
@pytest.mark.parametrize(("shape", "groups"), [((2, 7, 9, 64), 2), ((1, 1, 1, 16), 1), ((1, 3, 12, 48), 3)], ids=str)
def test_equals_torchvisions_operator(shape, groups, scale):
    """Also where most places are outside of the map."""
    pytest.importorskip("torchvision")
    x, numbers = _inputs(shape, groups, scale)
    want = aggregate_by_convolution(x, numbers[..., : 27 * groups], groups)
    of_want = _gradients(want, x, numbers)
    for found in (
        deformable_aggregation(x, numbers, groups),
        aggregate_by_bags(x, numbers[..., : 27 * groups], groups),
    ):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
        for a, b in zip(_gradients(found, x, numbers), of_want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert not of_want[1][..., 27 * groups :].any()


def test_offsets_of_zero_and_equal_masks_add_up_the_neighbours():
    x = torch.randn(1, 5, 6, 16)
    numbers = torch.cat([torch.zeros(1, 5, 6, 18), torch.ones(1, 5, 6, 9)], -1)
    want = 9 * torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(deformable_aggregation(x, numbers, 1), want)


def test_points_go_column_by_column():
    x = torch.arange(30.0).view(1, 5, 6, 1).expand(1, 5, 6, 16).contiguous()
    for p, step in ((0, -7.0), (1, -1.0), (2, 5.0), (3, -6.0), (8, 7.0)):
        numbers = torch.zeros(1, 5, 6, 27)
        numbers[..., 18 + p] = 1.0
        assert float(deformable_aggregation(x, numbers, 1)[0, 2, 2, 0] - x[0, 2, 2, 0]) == step
        numbers[..., 2 * p] = 1.0  # x comes first
        assert float(deformable_aggregation(x, numbers, 1)[0, 2, 2, 0] - x[0, 2, 2, 0]) == step + 1


def test_second_derivatives():
    x, numbers = _inputs((1, 2, 3, 16), 1, 0.3)
    weights = torch.randn(1, 2, 3, 16, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, n: deformable_aggregation(a, n, 1) * weights, (x, numbers))
    few = x[..., :1].detach().requires_grad_()
    wide = lambda a, n: deformable_aggregation(a.expand(-1, -1, -1, 16), n, 1)[..., :1]  # noqa: E731
    assert torch.autograd.gradgradcheck(wide, (few, numbers), atol=1e-4)


def test_function_transforms_and_forward_mode():
    x, numbers = _inputs((1, 4, 5, 16), 1)
    want = _gradients(deformable_aggregation(x, numbers, 1), x)[0]
    factor = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    found = torch.func.grad(lambda a: (deformable_aggregation(a, numbers.detach(), 1) * factor).sum())(x.detach())
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_wanted_gradient(needs):
    x, numbers = _inputs((1, 4, 5, 16), 1)
    every = _gradients(deformable_aggregation(x, numbers, 1), x, numbers)
    inputs = [t.detach().requires_grad_(need) for t, need in zip((x, numbers), needs, strict=True)]
    (found,) = _gradients(deformable_aggregation(*inputs, 1), inputs[needs.index(True)])
    torch.testing.assert_close(found, every[needs.index(True)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_types_are_computed_in_float32(dtype):
    x, numbers = (t.detach().to(dtype) for t in _inputs((1, 6, 7, 32), 2))
    found = deformable_aggregation(x, numbers, 2)
    assert found.dtype == dtype
    assert torch.equal(found, deformable_aggregation(x.float(), numbers.float(), 2).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deformable_aggregation(x.float(), numbers.float(), 2).to(dtype), found)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e30])
def test_places_nowhere_reach_no_memory(value):
    x, numbers = (t.detach() for t in _inputs((1, 4, 5, 16), 1))
    numbers[0, 2, 3, 4] = value
    found = deformable_aggregation(x, numbers, 1)
    other = torch.ones(4, 5, dtype=torch.bool)
    other[2, 3] = False
    assert found[0, other].isfinite().all()
    assert bool(found[0, 2, 3].isnan().all()) is (value != value)


def test_empty_batch():
    x, numbers = _inputs((0, 4, 5, 16), 1)
    assert deformable_aggregation(x, numbers, 1).shape == (0, 4, 5, 16)
    assert [g.shape[0] for g in _gradients(deformable_aggregation(x, numbers, 1), x, numbers)] == [0, 0]


def test_a_gpu_without_torchvision_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(BackendError, match="Install the torchvision release of your PyTorch"):
        aggregate_by_convolution(*_inputs((1, 4, 5, 16), 1), 1)


@pytest.mark.parametrize(("channels", "groups"), [(24, 1), (48, 2), (32, 3), (16, 0)])
def test_groups_of_other_than_sixteen_channels(channels, groups):
    with pytest.raises(ConfigError, match="expected groups of a multiple of 16 channels"):
        DeformableAggregation(channels, groups)


def test_widths_of_the_projection_are_upstreams():
    assert [DeformableAggregation(16 * g, g).offset_mask.out_features for g in (1, 2, 5, 40)] == [32, 56, 136, 1080]
    assert module.PER_GROUP == 27


# ---------------------------------------------------------------- the convolutions before it


def test_mixed_depthwise_is_four_convolutions_and_a_shuffle():
    """As one convolution and as four, with gradients."""
    torch.manual_seed(0)
    conv, x = MixedDepthwise(16, (3, 5, 7, 9)).double(), torch.randn(2, 6, 11, 16, dtype=torch.float64)
    parts = [layer(share) for layer, share in zip(conv, x.chunk(4, -1), strict=True)]
    want = nn.functional.channel_shuffle(torch.cat(parts, -1).permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    torch.testing.assert_close(conv(x), want)
    one = torch.autograd.grad(conv(x).pow(2).sum(), list(conv.parameters()))
    four = torch.autograd.grad(want.pow(2).sum(), list(conv.parameters()))
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_on_one_of_the_mixed_convolutions_run():
    conv, called = MixedDepthwise(16, (3, 5, 7, 9)), []
    conv[2].register_forward_hook(lambda *_: called.append(1))
    conv(torch.randn(1, 6, 6, 16))
    assert called == [1]
    with pytest.raises(ConfigError, match="18 channels for 4 kernels"):
        MixedDepthwise(18, (3, 5, 7, 9))
