"""One small data set for all tests of configs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmengine")

from tests.test_configs.small_data import write_data


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the digits in every layout."""
    pytest.importorskip("mmdet")
    return write_data(tmp_path_factory.mktemp("small_data"))
