"""The layers on their own."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.layers import SS2D, BatchNorm, ChannelsLastConv2d, DropPath, LayerNorm, Linear, build_downsample
from mmvmamba.ops import ScanOrder


def test_linear_loads_a_pointwise_convolution():
    layer, weight = Linear(3, 5), torch.randn(5, 3, 1, 1)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(5)}, strict=True)
    assert torch.equal(layer.weight, weight[:, :, 0, 0])


def test_linear_still_refuses_other_shapes():
    with pytest.raises(RuntimeError, match="size mismatch"):
        Linear(3, 5).load_state_dict({"weight": torch.randn(5, 3, 3, 3), "bias": torch.zeros(5)})


def test_linear_initialisation():
    layer = Linear(400, 400)
    assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(layer.bias.abs().max()) == 0.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_batch_norm_equals_batch_norm_2d(training, batch):
    """Values and gradients, compared in contiguous channel-first form (see the parity README for why)."""
    ours, reference = BatchNorm(5), torch.nn.BatchNorm2d(5)
    with torch.no_grad():
        ours.running_var.uniform_(0.5, 2.0)
        ours.running_mean.normal_()
        ours.weight.normal_()
    reference.load_state_dict(ours.state_dict())
    ours.train(training), reference.train(training)
    x = torch.randn(batch, 4, 6, 5, requires_grad=True)
    y = x.detach().permute(0, 3, 1, 2).contiguous().requires_grad_()
    gradient = torch.randn(batch, 5, 4, 6)
    out, want = ours(x).permute(0, 3, 1, 2), reference(y)
    out.backward(gradient)
    want.backward(gradient)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(x.grad.permute(0, 3, 1, 2), y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, reference.weight.grad, rtol=1e-4, atol=1e-4)


def test_layer_norm_takes_float32_in_a_half_model():
    norm = LayerNorm(8).bfloat16()
    assert norm(torch.randn(2, 8)).dtype == torch.float32


def test_convolution_keeps_channels_last_memory():
    x = torch.randn(2, 6, 7, 4)
    conv = ChannelsLastConv2d(4, 4, 3, padding=1, groups=4)
    out = conv(x)
    assert out.is_contiguous()
    torch.testing.assert_close(out.permute(0, 3, 1, 2), F.conv2d(x.permute(0, 3, 1, 2).contiguous(), conv.weight,
                                                                  conv.bias, padding=1, groups=4))  # fmt: skip


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    layer = DropPath(0.25).train()
    out = layer(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out.amin((1, 2)), out.amax((1, 2)))
    assert float(out.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(layer.eval()(torch.ones(3, 2)), torch.ones(3, 2))


@pytest.mark.parametrize(("kind", "rows", "columns"), [("patch_merging", 4, 3), ("conv2x2", 3, 2), ("conv3x3", 4, 3)])
def test_downsampling_sizes(kind, rows, columns):
    assert build_downsample(kind, 4, 6)(torch.randn(2, 7, 5, 4)).shape == (2, rows, columns, 6)


def test_downsampling_of_a_single_pixel():
    for kind in ("patch_merging", "conv2x2", "conv3x3"):
        assert build_downsample(kind, 4, 6)(torch.randn(1, 1, 1, 4)).shape == (1, 1, 1, 6)


def test_ss2d_initialisation():
    layer = SS2D(32, d_state=4)
    step = F.softplus(layer.dt_projs_bias)
    assert float(step.min()) >= 1e-3 * 0.999
    assert float(step.max()) <= 1e-1 * 1.001
    assert layer.dt_rank == 2
    assert torch.equal(layer.A_logs, torch.arange(1.0, 5.0).log().expand(4 * 64, 4))
    assert torch.equal(layer.Ds, torch.ones(256))
    assert float(layer.x_proj_weight.abs().max()) <= 1 / math.sqrt(64)
    assert float(layer.dt_projs_weight.abs().max()) <= 2**-0.5


@pytest.mark.parametrize(("kind", "a_mean"), [("random", 0.0), ("zero", 0.0)])
def test_ss2d_simple_initialisations(kind, a_mean):
    layer = SS2D(64, d_state=8, ssm_init=kind)
    assert float(layer.A_logs.mean()) == pytest.approx(a_mean, abs=0.05)
    assert float(layer.A_logs.std()) == pytest.approx(1.0 if kind == "random" else 0.0, abs=0.05)
    largest = float(layer.dt_projs_bias.abs().max())
    assert largest < 0.1 if kind == "zero" else 0.1 < largest < 1.0


def test_ss2d_softmax_sums_to_one():
    layer = SS2D(8, out_norm="softmax")
    y = layer.out_norm(torch.randn(2, 3, 5, 16))
    torch.testing.assert_close(y.sum((1, 2)), torch.ones(2, 16))


def test_ss2d_takes_any_number_of_orders():
    layer = SS2D(8, scan_orders=(ScanOrder.COLUMN, ScanOrder.ROW_REVERSED))
    assert layer.x_proj_weight.shape[0] == 2
    assert layer(torch.randn(1, 3, 4, 8)).shape == (1, 3, 4, 8)


def test_ss2d_refuses_unknown_options():
    with pytest.raises(ConfigError, match=r"out_norm is 'layernorm'.*Did you mean 'layer_norm'"):
        SS2D(8, out_norm="layernorm")
    with pytest.raises(ConfigError, match="ssm_init is 'v0'"):
        SS2D(8, ssm_init="v0")
