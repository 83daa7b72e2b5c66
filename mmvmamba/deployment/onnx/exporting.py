"""A network to an ONNX file, in two steps.

1. ``torch.export`` records the network for any size of the dimensions that are to be free. Our operators stay one node
   each.
2. ``torch.onnx.export`` translates PyTorch's operators, and ours by the functions of ``operators.py``.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.deployment.onnx.operators import translations
from mmvmamba.deployment.onnx.support import unsupported_parts
from mmvmamba.deployment.onnx.writer import EXTRA, OPSET
from mmvmamba.deployment.programs import DIMENSIONS, Dimension, Recorded, Sizes, record
from mmvmamba.errors import ConfigError, OutputError, nearest_spelling
from mmvmamba.optional import optional_package


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    Attributes:
        path: The file.
        opset: Version of ONNX's operators in it.
        outputs: Name and rank of every output, in order.
        sizes: For every free dimension the smallest size for which the recording is known to hold, and None, for there
            is no largest. Smaller ones may work, where a map that had more rows comes down to one; ``compare_onnx``
            tells.
        nodes: How many operators the graph has, bodies of loops included.
        megabytes: Size of the file, weights and all.
        seconds: How long it took.
    """

    path: Path
    opset: int
    outputs: tuple[tuple[str, int], ...]
    sizes: Sizes
    nodes: int
    megabytes: float
    seconds: float


def export_onnx(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    dynamic: Sequence[Dimension] = DIMENSIONS,
    opset: int = OPSET,
) -> OnnxReport:
    """Write a network as an ONNX file.

    The input is called ``image``; the outputs are ``output_0``, ``output_1``, ... in the order in which the network
    returns them, whatever tuples, lists or dicts they stand in.

    Args:
        module: Takes one image batch, returns tensors; in evaluation mode, in float32, on the CPU.
        example: An image batch (b, 3, h, w) to record with. Its values do not matter, nor the sizes of free
            dimensions, if no map of the network comes down to one row or column: twice the largest stride.
        path: The file to write, ending in ``.onnx``; one that is there is replaced.
        dynamic: What may have another size later.
        opset: Version of ONNX's operators, 20 or newer.

    Raises:
        MissingPackage: If onnx or onnxscript is not installed.
        ConfigError: If an argument is none of these, or the network has parts that ONNX cannot express.
        OutputError: If the file cannot be written.
    """
    file = _checked(module, example, path, dynamic, opset)
    for package in ("onnx", "onnxscript"):
        optional_package(package, EXTRA)
    started = time.perf_counter()
    with torch.no_grad(), _quiet():
        recorded = record(module, example, dynamic=dynamic)
        _require_no_largest(recorded)
        outputs = tuple(f"output_{i}" for i in range(len(recorded.program.graph_signature.user_outputs)))
        written = _translate(recorded.program, opset, outputs)
        _write(written, file)
    ranks = [len(value.shape or ()) for value in written.model.graph.outputs]
    return OnnxReport(
        path=file,
        opset=opset,
        outputs=tuple(zip(outputs, ranks, strict=True)),
        sizes=recorded.sizes,
        nodes=sum(1 for _ in written.model.graph.all_nodes()),
        megabytes=file.stat().st_size / 1e6,
        seconds=time.perf_counter() - started,
    )


def _checked(module: nn.Module, example: Tensor, path: str | Path, dynamic: Sequence[str], opset: int) -> Path:
    """Check all arguments and that the file can be written; return the file."""
    if isinstance(dynamic, str) or [name for name in dynamic if name not in DIMENSIONS]:
        spelling = nearest_spelling(dynamic if isinstance(dynamic, str) else dynamic[0], DIMENSIONS)
        raise ConfigError(f"dynamic is {dynamic!r}, expected some of {DIMENSIONS}. Correct it.{spelling}")
    if not isinstance(opset, int) or opset < OPSET:
        raise ConfigError(f"opset is {opset!r}, expected {OPSET} or newer. Leave it out.")
    if not isinstance(example, Tensor) or example.ndim != 4 or example.dtype != torch.float32 or not example.numel():
        found = f"{tuple(example.shape)}, {example.dtype}" if isinstance(example, Tensor) else type(example).__name__
        raise ConfigError(f"example is {found}, expected a float32 image batch (b, 3, h, w). Use torch.randn.")
    reasons = unsupported_parts(module)
    if reasons:
        raise ConfigError(
            f"{type(module).__name__} cannot be written as ONNX: {'; '.join(reasons)}. Expected a network of which "
            "unsupported_parts reports nothing. Export another part of it, or use another format."
        )
    file = Path(path)
    if file.suffix != ".onnx":
        raise ConfigError(f"path is {str(path)!r}, expected a file name that ends in .onnx. Correct it.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"{str(file)!r} cannot be written ({error.strerror or error}), expected a folder with room and the right "
            "to write. Choose another one."
        ) from error
    return file


def _translate(program: torch.export.ExportedProgram, opset: int, outputs: Sequence[str]) -> Any:
    try:
        return torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=translations(),
            opset_version=opset,
            input_names=["image"],
            output_names=list(outputs),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(
            f"the network cannot be written as ONNX: {_shortened(error)}. Expected operators that PyTorch's exporter "
            "or this package translates. Export a part without it, or use another format."
        ) from error


def _shortened(error: BaseException) -> str:
    """Return the reason that an error of PyTorch begins or, where there are causes, ends with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:400]


def _require_no_largest(recorded: Recorded) -> None:
    """Refuse a recording in which a map came down to one row or column: it is good for such sizes alone."""
    for axis, dimension in ((0, "batch"), (2, "height"), (3, "width")):
        low, high = recorded.sizes.get(dimension, (1, None))
        if high is not None:
            size = recorded.shape[axis]
            raise ConfigError(
                f"example has {dimension} {size}, at which a map of the network has but one row or column: the "
                f"file would be good for {low} to {high} alone; expected more for a free {dimension}. "
                f"Use {dimension} {2 * size}, or leave {dimension!r} out of dynamic."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep away what the exporter says about its own functions and about every node that it cannot simplify."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write(written: Any, file: Path) -> None:
    try:
        written.save(str(file), external_data=False)
    except OSError as error:
        raise OutputError(
            f"{str(file)!r} cannot be written ({error.strerror or error}), expected room for it. Choose another place."
        ) from error
