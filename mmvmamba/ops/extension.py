"""The only loader of the compiled extension ``mmvmamba._C``.

The library registers CPU (and, where built, CUDA) kernels for the operators declared in `mmvmamba.ops.library`. It
uses PyTorch's stable ABI, so one file serves every torch release from the one it targets on. The stamp beside it is
compared before the file is opened: a library that does not fit is reported, never loaded.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from mmvmamba.version import __version__

REBUILD = "run 'pip install --no-build-isolation .' in the source tree (needs a C++ compiler such as g++)"
STAMP_NAME = "_C.json"


@dataclass(frozen=True)
class Stamp:
    """What ``setup.py`` wrote beside the library about the build."""

    version: str
    torch_min: str
    torch_built: str
    machine: str
    cuda: str | None
    cuda_archs: tuple[str, ...]


def read_stamp(path: Path) -> Stamp:
    """Read the stamp file written by ``setup.py``.

    Raises:
        ValueError: The file is not a stamp.
    """
    fields = json.loads(path.read_text())
    try:
        return Stamp(
            version=fields["version"],
            torch_min=fields["torch_min"],
            torch_built=fields["torch_built"],
            machine=fields["machine"],
            cuda=fields["cuda"],
            cuda_archs=tuple(fields["cuda_archs"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a build stamp: {error!r}") from error


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
    return None


def _release(version: str) -> tuple[int, ...]:
    """``"2.11.0+cu130"`` -> ``(2, 11)``."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _load() -> str | None:
    """Load the library if it fits; return why not, or None when it is loaded."""
    spec = importlib.util.find_spec("mmvmamba._C")
    if spec is None or spec.origin is None:
        return f"the compiled extension was not built: {REBUILD}"
    stamp_path = Path(spec.origin).with_name(STAMP_NAME)
    if not stamp_path.is_file():
        return f"the extension {spec.origin} has no stamp {STAMP_NAME} beside it: {REBUILD}"
    try:
        problem = stamp_problem(read_stamp(stamp_path))
    except ValueError as error:
        return f"the stamp of the extension cannot be read ({error}): {REBUILD}"
    if problem is not None:
        return problem
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the extension {spec.origin} cannot be opened ({error}): {REBUILD}"
    return None


EXTENSION_PROBLEM: str | None = _load()
"""Why the compiled extension is not in use, or None."""
HAS_EXTENSION: bool = EXTENSION_PROBLEM is None
"""Whether the compiled CPU kernels are registered."""
