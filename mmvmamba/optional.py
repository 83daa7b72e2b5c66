"""Packages that only some features need, asked for where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from mmvmamba.errors import MissingPackage


def optional_package(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Such as ``"onnxruntime"``.
        extra: The extra of this project (``[project.optional-dependencies]`` of pyproject.toml) that brings it.

    Raises:
        MissingPackage: If the package is not installed; other errors of its import are passed on.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise MissingPackage(
            f"the package {error.name!r} is not installed, expected it for what was asked. "
            f"Run: pip install 'mmvmamba[{extra}]' (in a checkout: pip install '.[{extra}]')."
        ) from error
