"""Files of analysis tools, pictures as tensors, and packages that may be missing."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmvmamba.analysis.images import read_images
from mmvmamba.analysis.outputs import new_figure, output_folder, save_figure, write_csv, write_json
from mmvmamba.errors import DataError, MissingPackage, OutputError
from mmvmamba.optional import optional_package


def test_files(tmp_path: Path) -> None:
    folder = output_folder(tmp_path / "a" / "b")
    assert list(folder.iterdir()) == []
    rows = [{"model": "x, y", "value": 1.5}, {"model": "z", "value": 2}]
    with write_csv(folder / "t.csv", rows).open() as file:
        assert list(csv.DictReader(file)) == [{"model": "x, y", "value": "1.5"}, {"model": "z", "value": "2"}]
    assert json.loads(write_json(folder / "t.json", rows).read_text()) == rows
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(folder / "nan.json", [float("nan")])
    figure, axes = new_figure(2, 3)
    axes[2, 1].plot([0, 1], [0, 1])
    image = cv2.imread(str(save_figure(figure, folder / "t.png")))
    assert image.shape == (round(3 * 3.2 * 130), (2 * 4 * 130), 3) and image.std() > 1


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/mmvmamba")):
        with pytest.raises(OutputError, match="cannot be written to .*Choose another one"):
            output_folder(place)


def test_pictures_as_tensors(tmp_path: Path) -> None:
    colour = np.zeros((10, 20, 3), np.uint8)
    colour[..., 0] = 200  # blue
    cv2.imwrite(str(tmp_path / "b.png"), colour)
    cv2.imwrite(str(tmp_path / "a.png"), np.full((7, 5, 3), 30, np.uint8))
    images = read_images([tmp_path], 6, 8)
    assert images.shape == (2, 3, 6, 8) and images.dtype == torch.float32
    assert (images[0] == 30).all() and (images[1, 0] == 200).all() and (images[1, 1:] == 0).all()
    assert read_images([tmp_path], 4, 4, limit=1).shape == (1, 3, 4, 4)
    (tmp_path / "c.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"c\.jpg.*cannot be decoded"):
        read_images([tmp_path / "c.jpg"], 4, 4)
    with pytest.raises(DataError, match="0 x 4"):
        read_images([tmp_path], 0, 4)


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert optional_package("json", "export") is json
    with pytest.raises(MissingPackage, match=r"'no_such_thing' is not installed.*pip install 'mmvmamba\[export\]'"):
        optional_package("no_such_thing.inside", "export")
    (tmp_path / "broken_thing.py").write_text("import another_thing_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="another_thing") as raised:
        optional_package("broken_thing", "export")
    assert not isinstance(raised.value, MissingPackage)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match="matplotlib"):
        new_figure()
