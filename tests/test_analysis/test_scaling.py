"""Slopes of known powers, operations of known models, and a run that goes on past what refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from mmvmamba.analysis.outputs import save_figure
from mmvmamba.analysis.scaling import Point, check_sides, figure_of, scale, slope, slopes
from mmvmamba.analysis.throughput import FORWARD, Measurement, Settings, Subject
from mmvmamba.errors import ConfigError
from tests.nano_models import digits_config, script

QUICK = Settings(seconds=0.0, least_rounds=1)


class Linear(nn.Module):
    """Linear in the number of pixels; it refuses what is smaller than 16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < 16:
            raise ValueError("smaller than 16")
        return self.conv(x)


class Quadratic(nn.Module):
    """Every pixel meets every other."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        return rows.transpose(1, 2) @ rows


def subjects() -> list[Subject]:
    linear, quadratic = Linear(), Quadratic()
    return [Subject("linear", linear, linear), Subject("quadratic", quadratic, quadratic)]


def test_operations_by_hand_and_their_slopes():
    turns: list[int] = []
    points = scale(subjects(), [8, 16, 32], QUICK, batch=2, done=lambda: turns.append(1))
    assert len(turns) == 3 and [(point.model, point.side) for point in points] == [
        (model, side) for side in (8, 16, 32) for model in ("linear", "quadratic")
    ]
    by_model = {(point.model, point.side): point for point in points}
    assert by_model["linear", 8].problem == "smaller than 16"
    assert by_model["linear", 8].flops is None and by_model["linear", 8].images_per_second is None
    for side in (16, 32):
        assert by_model["linear", side].flops == side**2 * 3 * 4  # of one image, whatever the batch
        assert by_model["linear", side].measurement.batch == 2
        assert by_model["quadratic", side].flops == side**4 * 3
    rows = {row["model"]: row for row in slopes(points)}
    assert rows["linear"]["flops"] == pytest.approx(1) and rows["quadratic"]["flops"] == pytest.approx(2)


def point(model: str, side: int, flops: int | None, speed: float | None, memory: int | None) -> Point:
    measured = Measurement(model, FORWARD, 1, side, side, "float32", images_per_second=speed, step_bytes=memory)
    return Point(model, side, flops, speed, memory, measured)


def test_slopes_of_powers():
    sides = (224, 512, 1536)
    points = [point("a", s, 5 * s * s, 1e6 / s**2.2, int(1000 * s**1.8)) for s in sides]
    points += [point("b", 224, 10, 1.0, None), point("b", 512, None, None, 0)]
    a, b = slopes(points)
    assert a["flops"] == pytest.approx(1) and a["time"] == pytest.approx(1.1)
    assert a["memory"] == pytest.approx(0.9, abs=1e-3)
    assert b == {"model": "b", "flops": None, "time": None, "memory": None}
    assert slope(sides, [3e-9 * (side * side) ** 1.1 for side in sides]) == pytest.approx(1.1)


@pytest.mark.parametrize("sides", [[], [32, 16], [16, 16], [0, 4]])
def test_sides_are_checked(sides):
    with pytest.raises(ConfigError, match="expected sides of at least 1 in rising order"):
        check_sides(sides)
    with pytest.raises(ConfigError, match="batch is 0"):
        check_sides([8], 0)


def test_the_figure_has_a_line_for_each_model_and_what_it_could_take(tmp_path):
    points = [point("a", s, 5 * s * s, 1e6 / s**2, 1000 * s * s) for s in (224, 448)]
    points += [point("b", 224, None, None, None), point("b", 448, 7, 2.0, 9)]
    figure = figure_of(points, "a title")
    assert len(figure.axes) == 3
    for axis in figure.axes:
        one, other = axis.lines
        assert list(one.get_xdata()) == [224, 448] and list(other.get_xdata()) == [448]
        assert other.get_label() == "b"
    labels = [axis.lines[0].get_label() for axis in figure.axes]
    assert labels == ["a (+1.00)", "a (-1.00)", "a (+1.00)"]
    assert save_figure(figure, tmp_path / "figure.png").stat().st_size > 5000


def test_the_tool_goes_on_past_a_model_that_refuses_a_size(tmp_path, monkeypatch, capsys):
    """Swin's classifier takes no map smaller than its windows."""
    pytest.importorskip("mmpretrain")
    tool = script("tools/analysis_tools/scaling.py")
    words = [str(digits_config("cls")), "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"]
    words += ["--sides", "64", "224", "--seconds", "0", "--device", "cpu", "--out-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["scaling.py", *words])
    tool.main()
    printed = capsys.readouterr().out
    assert "The input shape (4, 4) is smaller than the window size (7)" in printed
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert len(content["points"]) == 4 and len(content["slopes"]) == 2
    assert content["points"][3]["flops"] == pytest.approx(4.5e9, rel=0.01)  # Swin-T at 224, as published
    assert content["points"][1]["flops"] is None and content["slopes"][1]["flops"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"scaling.csv", "scaling.json", "scaling.png"}


def test_whole_detectors_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("mmdet")
    tool = script("tools/analysis_tools/scaling.py")
    words = [str(digits_config("det")), "--part", "network", "--device", "cpu", "--out-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["scaling.py", *words])
    with pytest.raises(ConfigError, match="a whole detector is asked for"):
        tool.main()


def test_a_whole_classifier_is_counted_with_its_head():
    pytest.importorskip("mmpretrain")
    from mmvmamba.apis.measured import measured_part
    from mmvmamba.apis.networks import load_networks

    torch.manual_seed(0)
    (network,) = load_networks([digits_config("cls")], device="cpu")
    backbone, whole = (scale([measured_part(network, part)], [64], QUICK)[0].flops for part in ("backbone", "network"))
    assert whole - backbone == 256 * 10 + 256 * 2 * 2  # the linear map, and the mean of maps of 2 x 2
