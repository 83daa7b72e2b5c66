"""When SS2D takes the fused depthwise convolution, and that it never does for a layer that is not the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmvmamba.models.layers import SS2D, ChannelsLastConv2d
from mmvmamba.testing import requires_extension


def convolutions() -> dict[str, nn.Module]:
    return {
        "plain": ChannelsLastConv2d(16, 16, 3, padding=1, groups=16),
        "without bias": ChannelsLastConv2d(16, 16, 5, padding=2, groups=16, bias=False),
        "strided": ChannelsLastConv2d(16, 16, 3, stride=2, padding=1, groups=16),
        "dilated": ChannelsLastConv2d(16, 16, 3, padding=2, dilation=2, groups=16),
        "reflected": ChannelsLastConv2d(16, 16, 3, padding=1, padding_mode="reflect", groups=16),
        "dense": ChannelsLastConv2d(16, 16, 3, padding=1),
        "grouped": ChannelsLastConv2d(16, 16, 3, padding=1, groups=2),
        "none": nn.Identity(),
    }


@pytest.mark.parametrize("name", convolutions())
def test_equals_the_modules(name: str) -> None:
    op = SS2D(8)
    op.conv2d = convolutions()[name]
    x = torch.randn(2, 7, 9, 16)
    torch.testing.assert_close(op._convolve(x), op.act(op.conv2d(x)), rtol=1e-5, atol=1e-6)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("name", convolutions())
def test_only_the_plain_one_is_fused(name: str) -> None:
    op = SS2D(8)
    op.conv2d = convolutions()[name]
    with torch.profiler.profile() as profile:
        op._convolve(torch.randn(2, 7, 9, 16))
    fused = any(event.key == "mmvmamba::depthwise_conv2d" for event in profile.key_averages())
    assert fused == (name in ("plain", "without bias", "strided"))


@requires_extension()
@pytest.mark.ext
def test_hooks_on_convolution_and_activation_run() -> None:
    op = SS2D(8)
    called = []
    op.conv2d.register_forward_hook(lambda *_: called.append("conv"))
    op.act.register_forward_hook(lambda *_: called.append("act"))
    op._convolve(torch.randn(1, 4, 4, 16))
    assert called == ["conv", "act"]
