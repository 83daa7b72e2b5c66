"""Effective receptive fields of networks for which they are known exactly."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmvmamba.analysis.erf import (
    Field,
    check_stage,
    contribution_areas,
    draw_fields,
    effective_receptive_field,
    feature_map,
    held_by_squares,
)
from mmvmamba.errors import ConfigError, DataError
from mmvmamba.models.backbones import FAMILIES
from tests.nano_models import ROOT, nano_checkpoint, script

SIDE = 33
MIDDLE = SIDE // 2


def convolutions(depth: int, taps: list[float], channels: int = 3) -> nn.Sequential:
    """A stack of depthwise convolutions with the outer product of ``taps``: its field is known exactly."""
    kernel = torch.tensor(taps, dtype=torch.float64)
    layers = []
    for _ in range(depth):
        conv = nn.Conv2d(channels, channels, len(taps), padding=len(taps) // 2, groups=channels, bias=False).double()
        conv.weight.data[:] = torch.outer(kernel, kernel)
        layers.append(conv)
    return nn.Sequential(*layers)


def images(count: int = 2, side: int = SIDE) -> Tensor:
    """Positive, so that what is positive and linear stays so behind a positive part."""
    return torch.rand(count, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_convolutions_have_binomial_fields(depth: int) -> None:
    """Repeated n times, [1, 2, 1] is the row 2n of Pascal's triangle; outside of its 2n + 1 pixels is nothing."""
    field = effective_receptive_field(convolutions(depth, [1.0, 2.0, 1.0]), [images()])
    row = torch.zeros(SIDE, dtype=torch.float64)
    for k in range(2 * depth + 1):
        row[MIDDLE - depth + k] = math.comb(2 * depth, k)
    assert field.images == 2 and field.map_size == (SIDE, SIDE) and field.centre == (MIDDLE, MIDDLE)
    torch.testing.assert_close(field.values, 3 * torch.outer(row, row), rtol=1e-12, atol=0)


def test_magnitudes_are_summed_not_gradients() -> None:
    """What one colour adds another one takes away; a channel that is negative has no part."""
    net = convolutions(1, [1.0, 2.0, 1.0])
    (conv,) = net
    conv.weight.data[1] *= -1
    conv.bias = nn.Parameter(torch.tensor([0.0, 100.0, -100.0], dtype=torch.float64))
    field = effective_receptive_field(net, [images()])
    row = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    got = field.values[MIDDLE - 1 : MIDDLE + 2, MIDDLE - 1 : MIDDLE + 2]
    torch.testing.assert_close(got, 2 * torch.outer(row, row))


def test_strides_give_the_size_that_the_formula_says() -> None:
    """Three 3x3 convolutions of stride 2: 1 + 2 (1 + 2 + 4) = 15 pixels a side, in the middle of 64 pixels."""
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(3))).double()
    for conv in net:
        nn.init.ones_(conv.weight)
    field = effective_receptive_field(net, [images(1, 64)])
    rows, columns = field.values.nonzero().unbind(1)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (15, 15)
    assert field.map_size == (8, 8) and field.centre == (32, 32)  # cell 4 is centred on pixel 8 * 4
    (all_of_it,) = contribution_areas(field, [1.0])
    assert all_of_it.side == 15 and all_of_it.area_ratio == 15**2 / 64**2


def test_a_norm_at_the_end_does_not_hide_the_field() -> None:
    """Channels behind a layer norm sum to zero; the gradient of that sum would be rounding errors."""
    torch.manual_seed(0)
    model = FAMILIES["vmamba"]("nano", out_indices=(1,)).double().eval()
    field = effective_receptive_field(model, [images(1, 64)])
    assert field.values.max() > 1e-4
    assert abs(field.centre[0] - 32) < 8 and abs(field.centre[1] - 32) < 8


def test_what_a_window_ignores_has_no_part() -> None:
    """Patches of 4 pixels without overlap: the field is the patch."""
    patches = nn.Conv2d(3, 2, 4, stride=4).double()
    nn.init.constant_(patches.bias, 100.0)
    field = effective_receptive_field(patches, [images(1, 24)])
    assert field.values.nonzero().tolist() == [[i, j] for i in range(12, 16) for j in range(12, 16)]
    wanted = patches.weight.sum(0).abs().sum(0)
    torch.testing.assert_close(field.values[12:16, 12:16], wanted.detach())


def test_linear_networks_have_the_field_of_their_matrix() -> None:
    """Whatever the images: the mean over images of a constant; a global mean has a flat field."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 3)

    flat = effective_receptive_field(Mean(), [images(2), images(3)])
    assert flat.images == 5
    torch.testing.assert_close(flat.values, torch.full((SIDE, SIDE), 3 / SIDE**2, dtype=torch.float64))
    (half,) = contribution_areas(flat, [0.5])
    assert half.side == next(side for side in range(1, SIDE + 1, 2) if side**2 >= SIDE**2 / 2)
    assert half.area_ratio == half.side**2 / SIDE**2


def test_a_moved_image_moves_the_field() -> None:
    """Of a network that is not linear, away from the borders."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 3, padding=1)).double()

    class OneLeft(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x).roll((2, -1), (2, 3))

    picture = images(1)
    here = effective_receptive_field(net, [picture])
    there = effective_receptive_field(OneLeft(), [picture.roll((-2, 1), (2, 3))])
    torch.testing.assert_close(there.values, here.values.roll((-2, 1), (0, 1)))


def test_the_stage_is_the_map_that_is_asked() -> None:
    first, second = convolutions(1, [1.0, 1.0, 1.0]), convolutions(2, [1.0, 1.0, 1.0])

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return first(x), second(x)

    sizes = [int((effective_receptive_field(Two(), [images()], stage).values > 0).sum()) for stage in (0, 1, -1)]
    assert sizes == [9, 25, 25]
    with pytest.raises(ConfigError, match="stage is 2, expected one of the 2 maps"):
        feature_map(Two(), images(), 2)


def test_squares_count_every_pixel_once() -> None:
    values = torch.rand(7, 10, dtype=torch.float64)
    field = Field(values, (2, 8), (1, 1), 1)
    held = held_by_squares(field)
    for radius, got in enumerate(held.tolist()):
        inside = values[max(0, 2 - radius) : 2 + radius + 1, max(0, 8 - radius) : 8 + radius + 1]
        assert got == pytest.approx(float(inside.sum() / values.sum()))
    assert held[-1] == pytest.approx(1.0) and len(held) == 9
    (whole,) = contribution_areas(field, [1.0])
    assert whole.area_ratio == 1.0


def test_what_gives_no_maps_is_named_before_the_work() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x.mean((2, 3)),)

    with pytest.raises(ConfigError, match=r"Pooled returns \[\(1, 3\)\], expected maps \(b, c, h, w\)"):
        check_stage(Pooled(), -1, (8, 8))
    with pytest.raises(DataError, match="images is empty"):
        effective_receptive_field(convolutions(1, [1.0]), [])
    with pytest.raises(DataError, match="expected one size"):
        effective_receptive_field(convolutions(1, [1.0]), [images(1), images(1, 20)])
    with pytest.raises(DataError, match=r"sums to 0\.0"):
        contribution_areas(effective_receptive_field(convolutions(1, [0.0]), [images()]))
    with pytest.raises(ConfigError, match=r"share is 1\.5"):
        contribution_areas(Field(torch.ones(3, 3).double(), (1, 1), (1, 1), 1), [1.5])


def test_the_figure_has_a_panel_for_every_model(tmp_path: Path) -> None:
    import cv2

    fields = [(f"net\n{depth}", effective_receptive_field(convolutions(depth, [1.0, 2.0, 1.0]), [images()]))
              for depth in (1, 2, 3, 5)]  # fmt: skip
    draw_fields(fields, tmp_path / "erf.png")
    picture = cv2.imread(str(tmp_path / "erf.png"))
    assert picture.shape[1] > 1000 and picture.std() > 20


def test_command_line(tmp_path: Path, small_digits: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("mmpretrain")
    config = str(ROOT / "configs/cls/digits/vmamba-nano_digits.py")
    trained = nano_checkpoint("cls", tmp_path)
    out = tmp_path / "out"
    line = ["erf.py", config, config, "--weights", "random", str(trained), "--images", str(small_digits / "images/val")]
    monkeypatch.setattr(sys, "argv", [*line, "--shape", "64", "96", "--limit", "2", "--out-dir", str(out)])
    script("tools/analysis_tools/erf.py").main()
    rows = list(csv.DictReader((out / "erf.csv").open()))
    assert [row["weights"] for row in rows] == ["random weights"] * 4 + ["cls.pth"] * 4
    ratios = [float(row["area_ratio"]) for row in rows]
    assert ratios[:4] == sorted(ratios[:4]) and all(0 < ratio <= 1 for ratio in ratios)
    field = torch.from_numpy(np.load(out / "erf_1.npy")).double()
    assert field.shape == (64, 96)
    side = int(rows[6]["side"])
    centre = [int((field.sum(axis).cumsum(0) >= field.sum() / 2).nonzero()[0]) for axis in (1, 0)]
    for edge, holds in ((side, True), (side - 2, False)):
        low = [max(0, at - edge // 2) for at in centre]
        inside = field[low[0] : centre[0] + edge // 2 + 1, low[1] : centre[1] + edge // 2 + 1]
        assert bool(inside.sum() >= 0.5 * field.sum()) is holds
    assert json.loads((out / "erf.json").read_text())["images"] == 2
    assert "erf.png" in capsys.readouterr().out and (out / "erf.png").is_file()
