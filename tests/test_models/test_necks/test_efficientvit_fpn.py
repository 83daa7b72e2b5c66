"""The pyramid with transposed convolutions: its numbers restated, every option, what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.errors import ConfigError, OpInputError
from mmvmamba.models import EfficientViTFPN
from mmvmamba.testing import relative_error

WIDTHS, SIZES = (6, 10, 8), ((9, 13), (5, 7), (3, 4))
CASES = {
    "Mask R-CNN": dict(num_outs=5, num_extra_trans_convs=2, pre_norm=True),
    "RetinaNet": dict(num_outs=5, num_extra_trans_convs=1, pre_norm=True, add_extra_convs="on_input"),
    "RetinaNet without norms": dict(num_outs=5, num_extra_trans_convs=1, add_extra_convs=True),
    "every second pixel": dict(num_outs=6, num_extra_trans_convs=1),
    "of the lateral": dict(num_outs=5, add_extra_convs="on_lateral"),
    "of the output, after a ReLU": dict(num_outs=6, add_extra_convs="on_output", relu_before_extra_convs=True),
    "plain": dict(num_outs=3),
    "without the finest": dict(num_outs=4, start_level=1, num_extra_trans_convs=1, pre_norm=True,
                               add_extra_convs="on_input"),
}  # fmt: skip


def _restated(neck, maps, options):
    """Return the outputs by the names of the state dict, in float64."""
    state = {name: value.double() for name, value in neck.state_dict().items()}

    def conv(name, x, stride=1):
        weight = state[f"{name}.conv.weight"]
        return F.conv2d(x, weight, state[f"{name}.conv.bias"], stride, weight.shape[2] // 2)

    def norm(i, x):
        if "batch_norm.0.weight" not in state:
            return x
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"batch_norm.{i}.weight"] + state[f"batch_norm.{i}.bias"]

    start = options.get("start_level", 0)
    maps = [norm(i, x.double()) for i, x in enumerate(maps)][start:]
    laterals = [conv(f"lateral_convs.{i}", x) for i, x in enumerate(maps)]
    for i in reversed(range(len(laterals) - 1)):
        rows, columns = laterals[i].shape[2:]
        above = laterals[i + 1]
        row = [r * above.shape[2] // rows for r in range(rows)]
        column = [c * above.shape[3] // columns for c in range(columns)]
        laterals[i] = laterals[i] + above[:, :, row][:, :, :, column]
    outs = [conv(f"fpn_convs.{i}", x) for i, x in enumerate(laterals)]
    finer, x = [], laterals[0]
    count = options.get("num_extra_trans_convs", 0)
    for i in range(count):
        weight, bias = state[f"extra_trans_convs.{i}.conv.weight"], state[f"extra_trans_convs.{i}.conv.bias"]
        x = torch.einsum("bihw,iokl->bohkwl", x, weight).flatten(4).flatten(2, 3) + bias.view(-1, 1, 1)
        finer.insert(0, x)
    finer = [conv(f"extra_fpn_convs.{i}", x) for i, x in enumerate(finer)]
    kind = options.get("add_extra_convs", False)
    x = {False: outs[-1], True: maps[-1], "on_input": maps[-1], "on_lateral": laterals[-1], "on_output": outs[-1]}[kind]
    for i in range(options["num_outs"] - len(outs) - count):
        if kind is False:
            x = x[:, :, ::2, ::2]
        else:
            x = conv(f"fpn_convs.{len(laterals) + i}", x.relu() if i and "relu_before_extra_convs" in options else x, 2)
        outs.append(x)
    return [*finer, *outs]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    torch.manual_seed(0)
    neck = EfficientViTFPN(WIDTHS, 7, **CASES[name])
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.normal_(0.1, 0.5)
    maps = [torch.randn(2, width, *size) for width, size in zip(WIDTHS, SIZES, strict=True)]
    found, expected = neck(maps), _restated(neck, maps, CASES[name])
    assert len(found) == CASES[name]["num_outs"]
    for have, want in zip(found, expected, strict=True):
        assert have.is_contiguous() and relative_error(have.detach(), want) < 1e-5
    sum(out.sum() for out in found).backward()
    assert all(p.grad is not None for p in neck.parameters() if p.requires_grad)


def test_batch_of_none_and_bfloat16():
    neck = EfficientViTFPN(WIDTHS, 7, **CASES["RetinaNet"]).bfloat16()
    maps = [torch.randn(0, width, *size, dtype=torch.bfloat16) for width, size in zip(WIDTHS, SIZES, strict=True)]
    assert [out.dtype for out in neck(maps)] == [torch.bfloat16] * 5
    assert [out.shape[0] for out in neck(maps)] == [0] * 5


def test_it_starts_as_mmdets():
    neck = EfficientViTFPN(WIDTHS, 7, **CASES["Mask R-CNN"])
    neck.init_weights()
    convs = [m for m in neck.modules() if type(m) is torch.nn.Conv2d]
    assert all(not conv.bias.any() for conv in convs)
    bound = (6 / (WIDTHS[0] + 7)) ** 0.5
    assert 0.5 * bound < neck.lateral_convs[0].conv.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (dict(num_outs=2), "num_outs is 2, expected at least 3"),
        (dict(num_outs=4, num_extra_trans_convs=2), "num_outs is 4, expected at least 5"),
        (dict(num_extra_trans_convs=-1), "num_extra_trans_convs is -1"),
        (dict(start_level=3), "start_level is 3, expected 0 to 2"),
        (dict(in_channels=[]), "in_channels is"),
        (dict(out_channels=0), "out_channels 0"),
        (dict(add_extra_convs="on_inputs"), "add_extra_convs is 'on_inputs'.*'on_input'"),
    ],
)
def test_what_cannot_be_is_refused(bad, told):
    with pytest.raises(ConfigError, match=told):
        EfficientViTFPN(**(dict(in_channels=WIDTHS, out_channels=7, num_outs=5) | bad))


def test_another_number_of_maps_is_refused():
    neck = EfficientViTFPN(WIDTHS, 7, 3)
    with pytest.raises(OpInputError, match="got 2 maps, expected 3"):
        neck([torch.randn(1, 6, 4, 4), torch.randn(1, 10, 2, 2)])
