"""The only loader of the compiled extension ``mmvmamba._C``.

The library registers CPU (and, where built, CUDA) kernels for the operators declared in `mmvmamba.ops.library`. It
uses PyTorch's stable ABI, so one file serves every torch release from the one it targets on. The stamp beside it is
compared before the file is opened: a library that does not fit is reported, never loaded.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

import mmvmamba.ops.library  # noqa: F401  declares what the kernels attach themselves to
from mmvmamba.version import __version__

REBUILD = "run 'pip install --no-build-isolation .' in the source tree (needs a C++ compiler such as g++)"
STAMP_NAME = "_C.json"


@dataclass(frozen=True)
class Stamp:
    """What ``setup.py`` wrote beside the library about the build."""

    version: str
    torch_min: str
    machine: str
    sources_sha256: str
    cuda: str | None = None
    """CUDA version the device kernels were built with; None for a build without them."""
    cuda_archs: tuple[str, ...] = ()
    """GPU generations in the binary, e.g. ``("8.0", "9.0+PTX")``."""


def read_stamp(path: Path) -> Stamp:
    """Read the stamp file written by ``setup.py``; one without the fields on CUDA is of a build without it.

    Raises:
        ValueError: The file is not a stamp.
    """
    fields = json.loads(path.read_text())
    texts = ("version", "torch_min", "machine", "sources_sha256")
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in texts):
        raise ValueError(f"expected the texts {', '.join(texts)}, found {fields!r}")
    cuda, archs = fields.get("cuda"), fields.get("cuda_archs", [])
    if not isinstance(cuda, str | None) or not isinstance(archs, list) or not all(isinstance(a, str) for a in archs):
        raise ValueError(f"expected a version or null in cuda and a list of texts in cuda_archs, found {fields!r}")
    return Stamp(**{name: fields[name] for name in texts}, cuda=cuda, cuda_archs=tuple(archs))


def sources_sha256(root: Path) -> str | None:
    """Hash names and contents of the kernels' sources as ``setup.py`` does; None where there is no source tree."""
    suffixes = (".cpp", ".cu", ".h", ".cuh")
    if not (root / "setup.py").is_file() or not (root / "csrc").is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in (root / "csrc").rglob("*") if path.suffix in suffixes):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def stamp_problem(stamp: Stamp) -> str | None:
    """Return why a library with this stamp must not be loaded here, or None."""
    if stamp.version != __version__:
        return f"the extension was built for mmvmamba {stamp.version}, this is {__version__}: {REBUILD}"
    if stamp.machine != platform.machine():
        return f"the extension was built for {stamp.machine}, this machine is {platform.machine()}: {REBUILD}"
    if _release(torch.__version__) < _release(stamp.torch_min):
        return (
            f"the extension needs torch >= {stamp.torch_min}, this is {torch.__version__}: upgrade torch or {REBUILD}"
        )
    sources = sources_sha256(Path(__file__).parents[2])
    if sources is not None and sources != stamp.sources_sha256:
        return "the sources in csrc changed since the extension was built: run 'python setup.py build_ext --inplace'"
    return None


def _release(version: str) -> tuple[int, ...]:
    """``"2.11.0+cu130"`` -> ``(2, 11)``."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _load() -> Stamp | str:
    """Load the library if it fits; return its stamp, or why it is not loaded."""
    # Beside this package, not wherever the import system finds the name: an editable install of another checkout
    # would answer for a copy that has none.
    package = Path(__file__).parents[1]
    library = next((path for end in EXTENSION_SUFFIXES if (path := package / f"_C{end}").is_file()), None)
    if library is None:
        return f"the compiled extension was not built: {REBUILD}"
    stamp_path = library.with_name(STAMP_NAME)
    if not stamp_path.is_file():
        return f"the extension {library} has no stamp {STAMP_NAME} beside it: {REBUILD}"
    try:
        stamp = read_stamp(stamp_path)
    except (OSError, ValueError) as error:
        return f"the stamp of the extension cannot be read ({error}): {REBUILD}"
    problem = stamp_problem(stamp)
    if problem is not None:
        return problem
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the extension {library} cannot be opened ({error}): {REBUILD}"
    return stamp


_loaded = _load()
EXTENSION_PROBLEM: str | None = _loaded if isinstance(_loaded, str) else None
"""Why the compiled extension is not in use, or None."""
HAS_EXTENSION: bool = EXTENSION_PROBLEM is None
"""Whether the compiled CPU kernels are registered."""
CUDA_VERSION: str | None = None if isinstance(_loaded, str) else _loaded.cuda
"""CUDA version of the device kernels in the library; None without them."""
CUDA_ARCHS: tuple[str, ...] = () if isinstance(_loaded, str) else _loaded.cuda_archs
"""GPU generations these were built for."""
# Asked once: an operator that returns a text cannot be recorded by torch.jit.trace.
CPU_CAPABILITY: str | None = torch.ops.mmvmamba.cpu_capability() if HAS_EXTENSION else None
"""Instruction set of the compiled CPU kernels: default, neon, avx2 or avx512; None without them."""
