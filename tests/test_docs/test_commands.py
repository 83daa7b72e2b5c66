"""Every code block of the documents is run, or checked as far as can be, as ``treatments.py`` says of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")
pytest.importorskip("markdown_it")

from mmvmamba.registry import MODELS
from tests.nano_models import ROOT, nano_checkpoint
from tests.test_docs.blocks import Block, blocks, commands
from tests.test_docs.page import Folder, check_arguments, treat
from tests.test_docs.treatments import TREATMENTS, Treatment

BLOCKS = blocks()
PAGES = list(dict.fromkeys(block.page for block in BLOCKS))
CHECKPOINTS = {"cls": "iter_2000.pth", "det": "iter_800.pth", "seg": "iter_2000.pth"}


def treatment_of(block: Block) -> Treatment:
    """Return the one treatment of a block."""
    known = TREATMENTS.get(block.page, {})
    found = [treatment for start, treatment in known.items() if start in block.text]
    assert len(found) == 1, (
        f"{block.name} has {len(found)} treatments, expected one. Say in tests/test_docs/treatments.py what is done "
        f"with it:\n{block.text}"
    )
    return found[0]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished demo leaves: checkpoints of the three digits models, here with random weights."""
    folder = tmp_path_factory.mktemp("demo")
    for task, name in CHECKPOINTS.items():
        (folder / task).mkdir()
        shutil.move(nano_checkpoint(task, folder / task), folder / task / name)
        (folder / task / "last_checkpoint").write_text(f"work_dirs/demo/{task}/{name}")
    return folder


@pytest.fixture
def folder(
    tmp_path: Path, demo: Path, small_digits: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Folder]:
    """A folder like a checkout after the demo, in which the page's own modules can be imported."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(demo, tmp_path / "work_dirs/demo")
    page = request.getfixturevalue("page")
    if not any("digits.py --out data/digits" in block.text for block in BLOCKS if block.page == page):
        shutil.copytree(small_digits, tmp_path / "data/digits")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield Folder(tmp_path)
    own = [
        n for n in set(sys.modules) - before if str(getattr(sys.modules[n], "__file__", "")).startswith(str(tmp_path))
    ]
    for name in own:
        del sys.modules[name]
    for name, registered in list(MODELS.module_dict.items()):
        if registered.__module__ in own:
            del MODELS.module_dict[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, folder: Folder) -> None:
    for block in BLOCKS:
        if block.page == page:
            try:
                treat(block, treatment_of(block), folder)
            except Exception as error:
                raise AssertionError(f"{block.name}: {type(error).__name__}: {error}\n\n{block.text}") from error


def test_every_treatment_is_of_a_block() -> None:
    for page, known in TREATMENTS.items():
        for start in known:
            assert any(block.page == page and start in block.text for block in BLOCKS), f"{page}: {start!r}"


def test_every_block_has_a_treatment() -> None:
    for block in BLOCKS:
        treatment_of(block)


@pytest.mark.parametrize(
    "line",
    [
        "python tools/train.py",
        "python tools/train.py a.py --amps",
        "python tools/no_such_tool.py a.py",
        "python -m benchmarks.ops --no-such-flag",
        "tools/no_such.sh a.py 8",
        "pip install '.[no_such_extra]'",
        "rm -rf /",
    ],
)
def test_wrong_lines_are_found(line: str) -> None:
    """The checks without running see what a user would stumble over."""
    with pytest.raises((AssertionError, OSError)):
        check_arguments(commands(line)[0])
