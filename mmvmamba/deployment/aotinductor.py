"""Recorded networks compiled ahead of time by AOTInductor.

What PyTorch's operators do becomes C++ of its own, fused and compiled for the processor at hand; our scans are called
by name. A package needs PyTorch and our operators (``import mmvmamba.ops``) where it is loaded, and the kind of
processor it was compiled on, but neither a compiler nor the model's Python code.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

import mmvmamba.ops  # noqa: F401  (a package calls operators by name)
from mmvmamba.deployment.programs import Recorded, checked_file, is_compiled_package
from mmvmamba.errors import ConfigError, OutputError

#: Weights are laid out for oneDNN while compiling, which on processors that are not Intel's is twice as fast as MKL
#: (``mmvmamba/models/layers/onednn.py`` says why).
_SETTINGS = {"freezing": True}
#: Up to this release packages pass types to operators by one numbering and read them by another
#: (https://github.com/pytorch/pytorch/pull/173562): float32 arrives as float64.
_TYPES_MENDED_IN = "2.12"
_CALLS = ".wrapper.json"
"""End of the names of the files of a package that list calls of operators by name."""
#: PyTorch's number of a type in such a list (``torch._export.serde.schema.ScalarType``) -> the one it is read by
#: (``c10::ScalarType``), for the types that our operators take.
_READ_AS = {6: 5, 7: 6, 8: 7, 13: 15}


def check_compiler() -> None:
    """Raise a ConfigError where there is no C++ compiler, which AOTInductor starts."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "no C++ compiler was found, expected g++ for --format aotinductor. Install one (Debian: apt-get install "
            "g++), or name it in the environment variable CXX."
        ) from error


def compile_package(recorded: Recorded, path: str | Path) -> float:
    """Compile a recorded network into a package and return the seconds it took.

    Args:
        recorded: From `mmvmamba.deployment.programs.record`.
        path: The file to write, ending in ``.pt2``.

    Raises:
        ConfigError: If the name ends in something else, there is no compiler, or the compilation fails.
        OutputError: If the file cannot be written.
    """
    from torch._inductor.exc import InductorError

    file = checked_file(path)
    check_compiler()
    started = time.perf_counter()
    try:
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                recorded.program, package_path=str(file), inductor_configs=_SETTINGS
            )
        if TorchVersion(torch.__version__) < _TYPES_MENDED_IN:
            _mend_types(file)
    except OSError as error:
        raise OutputError(
            f"{str(file)!r} cannot be written ({error.strerror or error}), expected room and the right to. Choose "
            "another place."
        ) from error
    except (InductorError, RuntimeError) as error:
        raise ConfigError(
            f"AOTInductor cannot compile this network: {' '.join(str(error).split())[:400]}. Use another format."
        ) from error
    return time.perf_counter() - started


def _mend_types(file: Path) -> None:
    """Write the types in a package's calls of operators as they will be read, see ``_TYPES_MENDED_IN``."""
    mended = file.with_name(f".{file.name}.tmp")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(mended, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith(_CALLS):
                content = json.dumps(_with_types_as_read(json.loads(content))).encode()
            target.writestr(entry.filename, content)
    mended.replace(file)


def _with_types_as_read(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_types_as_read(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _READ_AS[entry] if key == "as_scalar_type" else _with_types_as_read(entry) for key, entry in value.items()
    }


def load_package(path: str | Path) -> Callable[[Tensor], Any]:
    """Return the function of a package: an image batch (b, 3, h, w) to what the network gave.

    Load only files that you trust: a package is machine code.

    Raises:
        ConfigError: If it is no package, or PyTorch cannot load it here.
    """
    if not is_compiled_package(path):
        raise ConfigError(
            f"{str(path)!r} is a program of torch.export, expected a package of AOTInductor. Load it with load_program."
        )
    try:
        loaded = torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be loaded ({' '.join(str(error).split())[:200]}). Compile it with this PyTorch on "
            "this kind of machine."
        ) from error

    def run(image: Tensor) -> Any:
        with torch.no_grad():
            return loaded(image.contiguous())

    return run
