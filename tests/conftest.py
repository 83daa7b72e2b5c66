"""Fixtures for all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_scope_left() -> Iterator[None]:
    """What a runner of another test made the default scope of all registries is forgotten."""
    yield
    if "mmengine.registry" in sys.modules:
        sys.modules["mmengine.registry"].DefaultScope._instance_dict.clear()


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits data set in a small size, for reading only: 16 scenes to train on and 12 others."""
    from mmvmamba.datasets import DigitsSettings, write_digits

    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits") / "data"
    write_digits(folder, DigitsSettings(train=16, val=12, train_crops=40, val_crops=20))
    return folder
