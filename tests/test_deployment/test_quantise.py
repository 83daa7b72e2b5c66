"""Linear maps in 8 bits: the numbers by hand, what is left alone, and programs of them."""

import pytest
import torch
from torch import nn

from mmvmamba.deployment.checks import compare
from mmvmamba.deployment.programs import load_program, record, save_program
from mmvmamba.deployment.quantise import quantise_linears
from mmvmamba.errors import ConfigError
from mmvmamba.models import FAMILIES, VMamba
from mmvmamba.models.layers import StepProjection

pytest.importorskip("torchao")


def _by_hand(weight, bias, x):
    """Products of integers of -127 to 127: a scale for every output channel and one for every row of ``x``."""
    out = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for i, row in enumerate(x.double()):
        row_scale = row.abs().max() / 127.5
        row_integers = (row / row_scale).round().clamp(-128, 127)
        for j, kernel in enumerate(weight.double()):
            scale = kernel.abs().max() / 127.5
            integers = (kernel / scale).round().clamp(-128, 127)
            out[i, j] = (row_integers * integers).sum() * row_scale * scale + bias[j].double()
    return out


def _largest_positive(rows):
    """Turn signs so that no row has its extreme below 0: -127.5 could be rounded either way."""
    extremes = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * extremes.sign()


@torch.no_grad()
def test_a_layer_by_hand():
    layer = nn.Linear(24, 7).eval()
    layer.weight.copy_(_largest_positive(layer.weight))
    x = _largest_positive(torch.randn(5, 24))
    quantised = quantise_linears(nn.Sequential(layer).eval())
    assert quantised.layers == ("0",)
    assert quantised.share == pytest.approx(24 * 7 / (24 * 7 + 7))
    found = quantised.module(x)
    assert torch.allclose(found.double(), _by_hand(layer.weight, layer.bias, x), atol=1e-5)
    # 8 bits are not float32: something was rounded.
    assert 1e-4 < float((found - layer(x)).abs().max()) < 0.05


@torch.no_grad()
def test_a_backbone(tmp_path):
    model = VMamba(dict(dims=[16, 32], depths=[1, 1]), out_indices=(0, 1)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantised = quantise_linears(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # it is a copy
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert set(quantised.layers) == linear and 0.2 < quantised.share < 1
    state = quantised.module.state_dict()
    for name, value in before.items():  # the scans stay float
        if name.rpartition(".")[0] not in linear:
            assert torch.equal(state[name], value)
    recorded = record(quantised.module)
    file = save_program(recorded, tmp_path / "int8.pt2")
    images = [torch.randn(1, 3, 64, 64), torch.randn(2, 3, 70, 99)]
    for run in compare(model, load_program(file), images):
        assert 1e-4 < run.error < 0.1
    for run in compare(quantised.module, load_program(file), images):
        assert run.error < 0.02  # a last bit before rounding can become the first one behind it


#: Families of 1x1 convolutions.
WITHOUT = {"mobilemamba", "efficientvim"}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT])
@torch.no_grad()
def test_every_family_runs_in_eight_bits(family):
    """Some scans take the weight of a linear layer that is never called, which must stay a plain tensor."""
    torch.manual_seed(0)
    model = FAMILIES[family]("nano").eval()
    quantised = quantise_linears(model)
    steps = {name for name, part in model.named_modules() if isinstance(part, StepProjection)}
    assert bool(steps) == (family in {"vim", "shufflemamba", "plainmamba"})
    assert not steps & set(quantised.layers)
    (run, *_) = compare(model, quantised.module, [torch.randn(1, 3, 64, 96)])
    assert 1e-6 < run.error < 0.1


def test_bad_input():
    with pytest.raises(ConfigError, match="has no linear layer"):
        quantise_linears(nn.Conv2d(3, 4, 1).eval())
    with pytest.raises(ConfigError, match="is in training mode"):
        quantise_linears(nn.Sequential(nn.Linear(3, 3)).train())
