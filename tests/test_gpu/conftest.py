"""One message instead of a hundred failures where there is no GPU, and the backends to test."""

from __future__ import annotations

import pytest
import torch

from mmvmamba.ops import available_backends
from mmvmamba.ops.backends import BACKENDS


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU keep one of these tests, whose failure says what is missing."""
    if torch.cuda.is_available() or config.option.collectonly:
        return
    ours = [item for item in items if item.get_closest_marker("gpu") is not None]
    if ours:
        config.hook.pytest_deselected(items=ours[1:])
        items[:] = [item for item in items if item not in ours[1:]]


@pytest.fixture(scope="session", autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA GPU and a torch built for it; run them on such a machine", pytrace=False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, _needs_a_gpu: None) -> str:
    """Each backend that can run on this GPU; that all can is a test of its own."""
    status = available_backends("cuda")[request.param]
    if not status.available:
        pytest.skip(status.reason)
    return str(request.param)
