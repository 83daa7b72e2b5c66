"""One small data set for all tests of configs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config

from tests.test_configs.small_data import write_data


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the digits in every layout."""
    pytest.importorskip("mmdet")
    return write_data(tmp_path_factory.mktemp("small_data"))


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Spare tests with a runner the layout of the config's text, which takes seconds, and free their models."""
    monkeypatch.setattr(Config, "pretty_text", "")
    yield
    if "small_data" in request.fixturenames:
        gc.collect()  # runners hold their models in circles
