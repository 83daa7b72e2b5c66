"""Fixtures for operator tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, in Python and C++ alike: a kernel that forgets to write an output fails."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
