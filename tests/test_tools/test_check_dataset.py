"""The command line: sources, exit codes, JSON, the policy skip; and that a training refuses wrong classes first."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmvmamba.apis import run_command
from mmvmamba.datasets import DigitsSettings, write_digits
from tests.nano_models import script
from tests.test_datasets.broken_pictures import good_pair, picture
from tests.test_datasets.planted import NAMES, sound, write_data

ROOT = Path(__file__).parents[2]


@dataclass
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    error: str


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Run a tool within this process, which has the libraries loaded."""

    def command(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_command(script(f"tools/{tool}").main)
        code, printed = end.value.code, capsys.readouterr()
        return Ended(1, printed.out, code) if isinstance(code, str) else Ended(code, printed.out, printed.err)

    return command


@pytest.fixture
def run(run_tool):
    """Run tools/check_dataset.py within this process."""
    return functools.partial(run_tool, "check_dataset.py")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "data"
    write_digits(out, DigitsSettings(40, 10, 5, 60, 60))
    return out


def _roots(digits):
    return ["--cfg-options", *(f"{split}_dataloader.dataset.data_root={digits}" for split in ("train", "val"))]


@pytest.mark.parametrize("task", ["det", "seg", "cls"])
def test_the_digits_configs(task, run, digits, tmp_path):
    (config,) = (ROOT / "configs" / task / "digits").glob("*.py")
    done = run(config, "--report", tmp_path / "report.json", *_roots(digits))
    assert done.returncode == 0, done.stdout + done.error
    assert done.stdout.splitlines()[-1] == "errors: 0, warnings: 0"
    report = json.loads((tmp_path / "report.json").read_text())
    assert [facts["pictures looked at"] for facts in report["checked"]] == ([60, 60] if task == "cls" else [40, 10])


def test_a_coco_file_with_errors(run, tmp_path):
    document = sound()
    document["annotations"][0]["bbox"] = [1, 1, -5, 5]
    document["images"][1]["file_name"] = "none.jpg"
    path, pictures = write_data(tmp_path, document)
    (pictures / "none.jpg").unlink()
    before = path.read_bytes()
    arguments = ["--coco", path, "--images", pictures, "--classes", *NAMES]
    done = run(*arguments)
    assert done.returncode == 1
    assert "error: box-negative, 1 times" in done.stdout and "none.jpg" in done.stdout
    assert done.error.startswith("error: the data set has 2 errors, expected none.")
    too_many = run(*arguments, "--policy", "skip", "--out", tmp_path / "kept")
    assert too_many.returncode == 1 and "1 of 6 images" in too_many.error
    assert not (tmp_path / "kept").exists()
    kept = run(*arguments, "--policy", "skip", "--out", tmp_path / "kept", "--max-skipped", "0.5")
    assert kept.returncode == 0, kept.error
    assert f"written: {tmp_path}/kept/coco.json: 5 of 6 images, 11 of 15 annotations" in kept.stdout
    again = run("--coco", tmp_path / "kept/coco.json", "--images", pictures)
    assert again.returncode == 0, again.stdout
    assert path.read_bytes() == before


def test_classes_of_a_coco_file(run, tmp_path):
    path, _ = write_data(tmp_path, sound())
    done = run("--coco", path, "--classes", "cat", "dgo")
    assert done.returncode == 1 and "'dgo' (did you mean 'dog'?)" in done.stdout


def test_folders_of_ade20k_and_imagenet(run, tmp_path):
    for ours, folder in (("training", "train"), ("validation", "val")):
        good_pair(tmp_path / ours, "a")
        for part, name in (("images", "images"), ("labels", "annotations")):
            (tmp_path / "ade" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / ours / part).rename(tmp_path / "ade" / name / ours)
        (tmp_path / "in1k" / folder / "n01440764").mkdir(parents=True)
        picture().save(tmp_path / "in1k" / folder / "n01440764/1.JPEG")
    done = run("--ade20k", tmp_path / "ade")
    assert done.returncode == 0 and "pictures looked at 1" in done.stdout, done.stdout
    assert run("--imagenet", tmp_path / "in1k").returncode == 0
    (tmp_path / "in1k/val/n02").mkdir()
    (tmp_path / "ade/annotations/training/a.png").unlink()
    done = run("--imagenet", tmp_path / "in1k")
    assert done.returncode == 1 and "only in val: ['n02']" in done.stdout
    done = run("--ade20k", tmp_path / "ade")
    assert done.returncode == 1 and "label-missing, 1 times" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "found nothing to check, expected one of CONFIG, --coco"),
        (["a.py", "--coco", "x"], "found config and coco"),
        (["--ade20k", "x", "--images", "y"], "--images: found without --coco"),
        (["--coco", "x", "--policy", "skip"], "--policy skip and --out: found one of the two"),
        (["--coco", "x", "--max-skipped", "2"], "--max-skipped is 2.0"),
        (["--coco", "x", "--workers", "0"], "--workers is 0"),
        (["none.py"], "config is 'none.py'"),
        (["--coco", "$(touch canary)"], "the data set has 1 error"),
    ],
)
def test_arguments_that_do_not_go_together(run, arguments, said):
    done = run(*arguments)
    assert done.returncode == 1 and said in done.error
    assert not (ROOT / "canary").exists()


def test_a_process_of_its_own(tmp_path):
    """Exit code and streams as a shell sees them."""
    document = sound()
    document["annotations"][0]["area"] = -1
    path, pictures = write_data(tmp_path, document)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tools/check_dataset.py", "--coco", str(path), "--images", str(pictures)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "errors: 1, warnings: 0")
    assert "pictures of planted" not in done.stderr  # progress is for large sets
    assert done.stderr.splitlines()[-1].startswith("error: the data set has 1 error")


def test_training_refuses_a_misspelt_class_before_anything_is_built(run_tool, digits, tmp_path):
    (config,) = (ROOT / "configs/det/digits").glob("*.py")
    classes = ("0", "1", "two", *"3456789")
    own = tmp_path / "own.py"
    own.write_text(
        f"_base_ = {str(config)!r}\ntrain_dataloader = dict(dataset=dict(metainfo=dict(classes={classes})))\n"
    )
    done = run_tool("train.py", own, "--work-dir", tmp_path / "work", *_roots(digits))
    assert done.returncode == 1
    assert "classes-not-in-file" in done.error and "only in classes: 'two'" in done.error
    assert not (tmp_path / "work").exists()
