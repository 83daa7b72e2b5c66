"""The set-up files are scripts, not modules of the package: loaded here by path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def setup_py() -> ModuleType:
    return _load("mmvmamba_setup", ROOT / "setup.py")


@pytest.fixture(scope="session")
def mim_folder() -> ModuleType:
    return _load("mmvmamba_mim_folder", ROOT / "scripts" / "mim_folder.py")


@pytest.fixture(scope="session")
def bootstrap() -> ModuleType:
    return _load("mmvmamba_bootstrap", ROOT / "scripts" / "bootstrap.py")
