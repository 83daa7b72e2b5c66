"""Captured routes are those that are drawn by hand in scripts/family_drawings.py, and what must hold of any route."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmvmamba.analysis.route_figures import draw_animation, draw_strip
from mmvmamba.analysis.routes import LayerWalks, Walk, walks_at_size, walks_of_layer
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones import FAMILIES
from scripts.family_drawings import DRAWINGS
from tests.nano_models import script

SIDE = 4
#: Family -> side of the image with which its first map has 4 x 4 cells.
IMAGE = {"vim": 64, "shufflemamba": 64, "plainmamba": 64, "mobilemamba": 64, "efficientvim": 64}


def captured(family: str, side: int) -> LayerWalks:
    torch.manual_seed(0)
    return walks_of_layer(family, FAMILIES[family]("nano").eval(), torch.zeros(1, 3, side, side))


def cells(walk: Walk) -> tuple[int, ...]:
    """Numbers of the cells, row by row; tokens that are no cells are left out."""
    return tuple(int(point[0]) * SIDE + int(point[1]) for point in walk.points if point is not None)


def drawn(family: str) -> set[tuple[int, ...]]:
    return {tuple(walk) for panel in DRAWINGS[family].panels for walk in panel.walks}


@pytest.mark.parametrize("family", ["vmamba", "hrvmamba", "plainmamba", "mobilemamba", "efficientvmamba"])
def test_routes_are_those_of_the_drawing(family: str) -> None:
    layer = captured(family, IMAGE.get(family, 16))
    assert (layer.rows, layer.columns) == (SIDE, SIDE)
    assert {cells(walk) for walk in layer.walks} == drawn(family)
    assert all(walk.ordered for walk in layer.walks)


def test_vim_s_way_there_is_drawn_in_two_parts_around_the_class_token() -> None:
    layer = captured("vim", 64)
    there, back = (cells(walk) for walk in layer.walks)
    first, second, whole = (tuple(panel.walks[0]) for panel in DRAWINGS["vim"].panels)
    assert there == first + second and back == whole
    assert layer.walks[0].points[len(first)] is None  # the class token


def test_shufflemamba_walks_in_order_outside_of_training() -> None:
    there, back, *shuffled = (tuple(walk) for panel in DRAWINGS["shufflemamba"].panels for walk in panel.walks)
    assert [cells(walk) for walk in captured("shufflemamba", 64).walks] == [there, back]
    assert len(shuffled) == 2


def test_msvmamba_walks_over_the_whole_map_once_and_over_half_of_it_as_often_as_drawn() -> None:
    whole, *half = (tuple(panel.walks[0]) for panel in DRAWINGS["msvmamba"].panels)
    assert cells(captured("msvmamba", 16).walks[0]) == whole
    layer = captured("msvmamba", 32)  # 8 x 8 cells, so that its half has 4 x 4
    walks = layer.walks[1:]
    assert [walk.start for walk in walks] == [0, 16, 32]
    got = [tuple(int(row // 2) * SIDE + int(column // 2) for row, column in walk.points) for walk in walks]
    assert got == half


@pytest.mark.parametrize("family", ["vssd", "efficientvim"])
def test_what_has_no_order_is_drawn_without_one(family: str) -> None:
    (walk,) = captured(family, IMAGE.get(family, 16)).walks
    assert not walk.ordered and sorted(cells(walk)) == list(range(SIDE * SIDE))
    assert all(panel.to_all for panel in DRAWINGS[family].panels)


def test_mambaout_has_none() -> None:
    assert not drawn("mambaout")
    with pytest.raises(ConfigError, match="MambaOut ran no scan operator"):
        captured("mambaout", 64)


def test_maps_have_about_the_size_that_was_asked() -> None:
    for family, cells in (("vmamba", 9), ("vim", 6)):
        layer = walks_at_size(family, FAMILIES[family]("nano").eval(), cells)
        assert (layer.rows, layer.columns) == (cells, cells)
    with pytest.raises(ConfigError, match="cells is 1"):
        walks_at_size("vmamba", FAMILIES["vmamba"]("nano"), 1)
    with pytest.raises(ConfigError, match="layer is 'nothing'"):
        walks_at_size("vmamba", FAMILIES["vmamba"]("nano"), 6, "nothing")


def test_pictures_show_time(tmp_path: Path) -> None:
    from PIL import Image

    layers = [LayerWalks("one", "layer", 2, 2, (Walk("row", ((0.5, 0.5), (0.5, 1.5), None, (1.5, 0.5))),))]
    strip = Image.open(draw_strip(layers, tmp_path / "strip.png")).convert("RGB")
    animation = Image.open(draw_animation(layers, tmp_path / "walk.gif"))
    assert animation.n_frames == 4 and animation.size == strip.size
    coloured = []
    for frame in range(animation.n_frames):
        animation.seek(frame)
        pixels = np.asarray(animation.convert("RGB")).astype(int)
        coloured.append(int((np.ptp(pixels, axis=2) > 80).sum()))
    # A dot, a line under the black dot of the last step, the whole line, and a cell that no line leads to.
    assert coloured[0] < coloured[1] < coloured[2] == coloured[3]


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scan_routes.py", "--cells", "4", "--no-animation", "--out-dir", str(tmp_path)])
    script("tools/analysis_tools/scan_routes.py").main()
    assert "PlainMamba" in capsys.readouterr().out
    found = json.loads((tmp_path / "scan_routes.json").read_text())
    assert [layer["title"] for layer in found] == [cls.__name__ for name, cls in FAMILIES.items() if name != "mambaout"]
    assert (tmp_path / "scan_routes.png").is_file() and not (tmp_path / "scan_routes.gif").exists()
