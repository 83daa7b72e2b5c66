"""One training step and one test of every recipe on a GPU, in the mixed precision that its config asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason="configs need mmengine")

from mmvmamba.apis import build_runner, prepare_training
from tests.test_configs.small_data import CONFIGS, SCOPES, name_of, small_config, task_of, write_data
from tests.test_configs.steps import make_test_step, make_training_step

pytestmark = pytest.mark.gpu

RECIPES = [path for path in CONFIGS if path.parent.name == "vmamba" and "tiny-s1l8" in path.name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mmdet", reason="the layout of COCO takes its classes from mmdet")
    return write_data(tmp_path_factory.mktemp("small_data"))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_makes_a_training_and_a_test_step(path: Path, data: Path, tmp_path: Path) -> None:
    task = task_of(path)
    pytest.importorskip(SCOPES[task])
    cfg = small_config(path, data, tmp_path)
    assert not any("float32" in note.text or "no GPU" in note.text for note in prepare_training(cfg))
    runner = build_runner(cfg)
    assert next(runner.model.parameters()).is_cuda
    make_training_step(runner)
    wrapper = "Bfloat16OptimWrapper" if task == "det" else "AmpOptimWrapper"
    assert type(runner.optim_wrapper).__name__ == wrapper
    make_test_step(runner, task)
