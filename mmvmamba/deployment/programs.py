"""Networks as programs of ``torch.export``, for any image size.

A program holds our operators as they are, one node each: whoever loads it imports ``mmvmamba.ops`` first, and has the
kernels of the machine it runs on. `load_program` does so.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mmvmamba.ops  # noqa: F401  (a program names operators, which must be there before it is read)
from mmvmamba.deployment.parts import obstacles
from mmvmamba.errors import ConfigError, OutputError

Dimension = Literal["batch", "height", "width"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
"""What can be left free of an image batch (b, 3, h, w)."""
_AXIS = {"batch": 0, "height": 2, "width": 3}
#: What PyTorch's archives of compiled packages have inside, and programs have not.
_COMPILED = "data/aotinductor/"
#: Sides to record with: large enough that no map becomes a single pixel, which would be taken to be one for ever.
EXAMPLE_SIDES = (160, 224)

Sizes = dict[str, tuple[int, int | None]]
"""Free dimension -> smallest and largest size (None: no bound)."""


@dataclass(frozen=True)
class Recorded:
    """A recorded network.

    Attributes:
        program: PyTorch's program.
        sizes: What it is good for.
        shape: The image batch (b, 3, h, w) that it was recorded with; what is not in ``sizes`` stays so.
    """

    program: torch.export.ExportedProgram
    sizes: Sizes
    shape: tuple[int, ...]


def record(module: nn.Module, example: Tensor | None = None, *, dynamic: Sequence[Dimension] = DIMENSIONS) -> Recorded:
    """Record a network for any size of the dimensions named by ``dynamic``.

    Args:
        module: Takes one image batch, returns tensors; in evaluation mode.
        example: An image batch (b, 3, h, w). Its values and the sizes of free dimensions do not matter, but for small
            sides the smallest maps may have one pixel, which is then taken to be so for ever. None takes a batch of 2
            (of 1 if the batch is not free) and ``EXAMPLE_SIDES``.
        dynamic: What may have another size later.

    Raises:
        ConfigError: If ``dynamic`` names something else, the module cannot be exported, or only for some sizes that are
            no range.
    """
    unknown = [name for name in dynamic if name not in DIMENSIONS]
    if isinstance(dynamic, str) or unknown:
        raise ConfigError(f"dynamic is {dynamic!r}, expected some of {DIMENSIONS}. Correct it.")
    reasons = obstacles(module)
    if reasons:
        raise ConfigError(f"{type(module).__name__} cannot be exported: {'; '.join(reasons)}. Mend that first.")
    if example is None:
        example = torch.zeros(2 if "batch" in dynamic else 1, 3, *EXAMPLE_SIDES)
    elif "batch" in dynamic and len(example) == 1:
        example = example.expand(2, -1, -1, -1).contiguous()  # a batch of 1 is taken to be one for ever
    free = {_AXIS[name]: torch.export.Dim.DYNAMIC for name in dynamic}
    try:
        with torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=(free,))
    except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"{type(module).__name__} cannot be exported for free {', '.join(dynamic) or 'nothing'}: "
            f"{' '.join(str(error).split())[:400]}. Free fewer dimensions, or choose another part or model."
        ) from error
    return Recorded(program, _free_sizes(program, dynamic), tuple(example.shape))


def _free_sizes(program: torch.export.ExportedProgram, dynamic: Sequence[Dimension]) -> Sizes:
    """Return the range that recording found for every free dimension."""
    (name,) = program.graph_signature.user_inputs
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)
    sizes: Sizes = {}
    for dimension in DIMENSIONS:
        if dimension not in dynamic:
            continue
        bounds = program.range_constraints[shape[_AXIS[dimension]].node.expr]
        # Recording says 2 of every size that it does not take to be 1; the program does not know the difference.
        low = 1 if int(bounds.lower) <= 2 else int(bounds.lower)
        sizes[dimension] = low, int(bounds.upper) if bounds.upper.is_Integer else None
    return sizes


def save_program(recorded: Recorded, path: str | Path) -> Path:
    """Write a program to a file that ends in ``.pt2`` and return the file.

    Raises:
        ConfigError: If the name ends in something else.
        OutputError: If it cannot be written.
    """
    file = checked_file(path)
    try:
        torch.export.save(recorded.program, file)
    except OSError as error:
        raise OutputError(
            f"{str(file)!r} cannot be written ({error.strerror or error}), expected room and the right to. Choose "
            "another place."
        ) from error
    return file


def checked_file(path: str | Path) -> Path:
    """Return the file to write a program or package to; a ConfigError says that its name does not end in ``.pt2``."""
    file = Path(path)
    if file.suffix != ".pt2":
        raise ConfigError(f"path is {str(path)!r}, expected a file name that ends in .pt2. Correct it.")
    return file


def load_program(path: str | Path) -> Callable[[Tensor], Any]:
    """Return the function of a program file: an image batch (b, 3, h, w) to what the network gave.

    Read only files that you trust: PyTorch's reader of programs can be made to run code.

    Raises:
        ConfigError: If it is no such file.
    """
    if is_compiled_package(path):
        raise ConfigError(
            f"{str(path)!r} is a package of AOTInductor, expected a program of torch.export. Load it with load_package."
        )
    try:
        program = torch.export.load(Path(path))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read as a program ({' '.join(str(error).split())[:200]}). Export it again with "
            "this PyTorch."
        ) from error
    module = program.module()

    def run(image: Tensor) -> Any:
        with torch.no_grad():
            return module(image)

    return run


def is_compiled_package(path: str | Path) -> bool:
    """Return whether a ``.pt2`` file is a package of AOTInductor rather than a program.

    Raises:
        ConfigError: If there is no such file, or it is neither.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_COMPILED in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{str(path)!r} is no archive of PyTorch ({error}), expected a .pt2 file that export.py wrote. Correct the "
            "path, or export again."
        ) from error


def flat_tensors(outputs: object) -> list[Tensor]:
    """Return the tensors that a network gave, in order, whatever tuples, lists or dicts they stand in."""
    return [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]
