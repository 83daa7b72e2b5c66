"""The command lines of figures: what they write, and that mistakes are named before any long work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.nano_models import ROOT, nano_checkpoint, script

pytest.importorskip("mmpretrain")

CLS = str(ROOT / "configs/cls/digits/vmamba-nano_digits.py")
TOOLS = ("erf", "scan_maps", "scan_routes", "cam")


def run(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *arguments])
    script(f"tools/analysis_tools/{tool}.py").main()


def failure(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: str) -> str:
    """Return the line that the shell would show."""
    from mmvmamba.apis import run_command

    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        run_command(script(f"tools/analysis_tools/{tool}.py").main)
    return str(exit_.value)


def test_scan_maps_are_drawn_and_kept(tmp_path: Path, small_digits: Path, monkeypatch, capsys) -> None:
    line = [CLS, "--images", str(small_digits / "images/val"), "--shape", "64", "96", "--out-dir", str(tmp_path)]
    run(monkeypatch, "scan_maps", *line, "--layer", "all", "--pixel", "10", "80", "--kind", "decayed", "weight")
    about = json.loads((tmp_path / "scan_maps.json").read_text())
    assert about["pixel"] == [10, 80] and len(about["layers"]) == 5
    first = about["layers"][0]
    assert first["layer"] == "layers.0.blocks.0.op" and first["cell"] == [2, 20] and first["shape"] == [16, 24]
    maps = np.load(tmp_path / "scan_maps.npz")
    assert maps["layers.0.blocks.0.op/weight"].shape == (4, 16, 24)
    np.testing.assert_allclose(maps["layers.0.blocks.0.op/qk"].sum((1, 2)), first["sums"]["qk"], rtol=1e-5)
    assert cv2.imread(str(tmp_path / "scan_maps.png")).std() > 20
    assert "layers.2.blocks.1.op  weight" in capsys.readouterr().out


def test_layers_are_listed(tmp_path: Path, small_digits: Path, monkeypatch, capsys) -> None:
    images = ["--images", str(small_digits / "images/val"), "--out-dir", str(tmp_path)]
    run(monkeypatch, "scan_maps", CLS, *images, "--list-layers")
    out = capsys.readouterr().out.splitlines()
    wanted = "layers.0.blocks.0.op 56 x 56 row, column, row reversed, column reversed"
    assert " ".join(out[0].split()) == wanted
    assert len(out) == 5 and not (tmp_path / "scan_maps.png").exists()


@pytest.mark.parametrize("tool", ["erf", "scan_maps", "cam"])
def test_mistakes_end_with_one_line(tool: str, tmp_path: Path, small_digits: Path, monkeypatch) -> None:
    good = ["--images", str(small_digits / "images/val"), "--out-dir", str(tmp_path / "out"), "--shape", "64", "64"]
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert "has no image right in it" in failure(monkeypatch, tool, CLS, *good, "--images", str(empty))
    assert "cannot be decoded" in failure(monkeypatch, tool, CLS, *good, "--images", str(tmp_path / "bad.png"))
    assert "does not exist" in failure(monkeypatch, tool, CLS, *good, "--images", str(tmp_path / "absent"))
    assert "cannot be written to" in failure(monkeypatch, tool, CLS, *good, "--out-dir", str(tmp_path / "bad.png"))
    assert "vmamba-nanno" in failure(monkeypatch, tool, "vmamba-nanno", *good)
    detector = nano_checkpoint("det", tmp_path)
    assert "does not fit ImageClassifier" in failure(monkeypatch, tool, CLS, *good, "--weights", str(detector))


def test_what_cannot_be_looked_at_is_named(tmp_path: Path, small_digits: Path, monkeypatch) -> None:
    good = ["--images", str(small_digits / "images/val"), "--out-dir", str(tmp_path), "--shape", "64", "64"]
    assert "Add --no-animation" in failure(monkeypatch, "scan_routes", "--cells", "17", "--out-dir", str(tmp_path))
    assert "inside 64 x 64" in failure(monkeypatch, "scan_maps", CLS, *good, "--pixel", "64", "0")
    found = failure(monkeypatch, "scan_maps", CLS, *good, "--layer", "layers.0.blocks.0")
    assert "Did you mean 'layers.0.blocks.0.op'" in found
    assert "ran no scan operator" in failure(
        monkeypatch, "scan_maps", "mmpretrain::resnet/resnet18_8xb32_in1k.py", *good
    )
    vit = "mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py"
    assert "expected maps (b, c, h, w)" in failure(monkeypatch, "erf", vit, *good, "--shape", "384", "384")
    assert "expected one of the 1 maps" in failure(monkeypatch, "erf", CLS, *good, "--stage", "2")
    assert "expected one of GradCAM" in failure(monkeypatch, "cam", CLS, *good, "--method", "Grad")


@pytest.mark.parametrize("tool", ["erf", "cam"])
@pytest.mark.parametrize("limit", ["0", "-1"])
def test_no_images_are_no_number_of_images(tool: str, limit: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", CLS, "--limit", limit])
    with pytest.raises(SystemExit, match="2"):
        script(f"tools/analysis_tools/{tool}.py").parse_args()
    assert f"{limit} images, expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("tool", TOOLS)
def test_help_names_every_option(tool: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        script(f"tools/analysis_tools/{tool}.py").parse_args()
    assert "--out-dir" in capsys.readouterr().out


def test_it_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "tools/analysis_tools/scan_routes.py", "--cells", "1", "--out-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: cells is 1, expected at least 2")


def test_default_images_are_made_once(tmp_path: Path, monkeypatch) -> None:
    from mmvmamba.apis.analysis_images import DEFAULT_DATA, image_paths

    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (folder,) = image_paths(None)
    made = (DEFAULT_DATA / "manifest.json").stat().st_mtime_ns
    assert len(list(Path(folder).glob("*.jpg"))) == 24
    assert image_paths(None) == [folder] and (DEFAULT_DATA / "manifest.json").stat().st_mtime_ns == made
