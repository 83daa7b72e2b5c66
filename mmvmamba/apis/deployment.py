"""Networks exported, checked and timed; and exported parts put back into a network, for its test.

``tools/deployment/export.py`` and ``tools/deployment/test_exported.py`` are the command lines.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmvmamba.analysis.outputs import write_json
from mmvmamba.apis.networks import Network
from mmvmamba.deployment.aotinductor import check_compiler, compile_package, load_package
from mmvmamba.deployment.checks import TOLERANCE, Run, compare, random_images, require_equal
from mmvmamba.deployment.parts import PARTS, Part, part_of
from mmvmamba.deployment.programs import (
    DIMENSIONS,
    EXAMPLE_SIDES,
    Dimension,
    Sizes,
    is_compiled_package,
    load_program,
    record,
    save_program,
)
from mmvmamba.deployment.quantise import EXTRA, quantise_linears
from mmvmamba.errors import ConfigError, OpInputError
from mmvmamba.optional import optional_package
from mmvmamba.version import __version__

#: Format -> ending of its file.
FORMATS = {"torch": ".pt2", "aotinductor": ".pt2", "onnx": ".onnx"}
#: Of a quantised network: how many sizes are compared with the rounded one, and how far it may be from it, where an
#: activation between two integers is rounded the other way.
_JUDGED, _INT8_TOLERANCE = 3, 0.05
_FINITE = 1e300
"""What the difference of a quantised network must be below: it is reported, not judged, but must be a number."""


@dataclass(frozen=True)
class ExportRequest:
    """What is to be made of a network.

    Attributes:
        part: A key of ``PARTS``.
        format: A key of ``FORMATS``.
        dynamic: Which dimensions are free.
        int8: Whether linear maps multiply 8-bit integers.
        sides: Height and width to record with, which stay where they are not free.
        images: How many random sizes are compared with PyTorch.
        repeats: How often both are timed at each.
        tolerance: Largest difference, relative to the largest value.
    """

    part: str
    format: str = "torch"
    dynamic: tuple[Dimension, ...] = DIMENSIONS
    int8: bool = False
    sides: tuple[int, int] = EXAMPLE_SIDES
    images: int = 20
    repeats: int = 5
    tolerance: float = TOLERANCE

    def check(self) -> None:
        """Find out before anything is built what cannot be had.

        Raises:
            ConfigError: If a value is impossible, or the combination is, or there is no compiler.
            MissingPackage: If a package is not installed.
        """
        for name, value, choices in (("part", self.part, PARTS), ("format", self.format, FORMATS)):
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}. Correct it.")
        unknown = [name for name in self.dynamic if name not in DIMENSIONS]
        if unknown:
            raise ConfigError(f"dynamic is {self.dynamic!r}, expected some of {DIMENSIONS}. Correct it.")
        if min(self.sides) < 1 or self.images < 1 or self.repeats < 0 or not self.tolerance > 0:
            raise ConfigError(
                f"sides {self.sides}, images {self.images}, repeats {self.repeats} and tolerance {self.tolerance}: "
                "expected sides and images of at least 1, repeats of at least 0 and a tolerance above 0. Correct them."
            )
        if self.int8 and self.format == "onnx":
            raise ConfigError(
                "int8 with the format 'onnx': torchao's integers are no operators of ONNX, expected 'torch' or "
                "'aotinductor'. Quantise the ONNX file with onnxruntime's own tools, or choose another format."
            )
        if self.int8:
            optional_package("torchao.quantization", EXTRA)
        if self.format == "onnx":
            for package in ("onnx", "onnxscript", "onnxruntime"):
                optional_package(package, EXTRA)
        if self.format == "aotinductor":
            check_compiler()


@dataclass(frozen=True)
class Export:
    """What was made.

    Attributes:
        file: The exported part.
        description: The JSON file beside it, which says what it takes and gives, and holds everything below.
        sizes: Free dimension -> smallest and largest size.
        runs: Comparison with PyTorch's network, before any quantisation.
        seconds: How long recording, translation and compilation took.
        megabytes: Size of the file.
        quantised: How many linear maps multiply integers.
    """

    file: Path
    description: Path
    sizes: Sizes
    runs: tuple[Run, ...]
    seconds: float
    megabytes: float
    quantised: int


def export_network(
    network: Network, request: ExportRequest, folder: Path, progress: Callable[[str], None] = lambda _: None
) -> Export:
    """Export a part of a network into a folder, compare it with PyTorch and time both.

    Args:
        network: From ``load_networks``, on the CPU.
        request: What to make.
        folder: Exists and can be written to.
        progress: Gets a line before every step.

    Raises:
        ConfigError: If the request is impossible, the part cannot be exported, or it does not give PyTorch's numbers.
        MissingPackage: If a package is not installed.
        OutputError: If a file cannot be written.
    """
    request.check()
    part = part_of(network.model, network.task, request.part)
    if next(part.module.parameters()).device.type != "cpu":
        raise ConfigError(
            "the network is not on the CPU, expected it there: exports are made for it. Use device='cpu'."
        )
    stem = "_".join((network.name, request.part, *(["int8"] if request.int8 else []), request.format))
    file = folder / (stem + FORMATS[request.format])
    started = time.perf_counter()
    module, layers = part.module, 0
    if request.int8:
        progress("rounding the linear maps to 8 bits")
        quantised = quantise_linears(module)
        module, layers = quantised.module, len(quantised.layers)
    description = file.with_suffix(file.suffix + ".json")
    description.unlink(missing_ok=True)  # one of an earlier export must not vouch for a file that fails the comparison
    sizes, shape = _write(module, request, file, progress)
    seconds = time.perf_counter() - started
    progress(f"comparing with PyTorch at {request.images} random sizes")
    images = random_images(sizes, shape, request.images)
    call = _opened(file)
    runs = compare(part.module, call, images, repeats=request.repeats)
    if request.int8:
        # What rounding costs is reported, not judged; but the file must be the rounded network.
        require_equal(runs, _FINITE)
        require_equal(compare(module, call, random_images(sizes, shape, _JUDGED)), _INT8_TOLERANCE)
    else:
        require_equal(runs, request.tolerance)
    export = Export(
        file=file,
        description=description,
        sizes=sizes,
        runs=tuple(runs),
        seconds=seconds,
        megabytes=file.stat().st_size / 1e6,
        quantised=layers,
    )
    write_json(export.description, _description(network, part, request, export, shape))
    return export


def _write(
    module: nn.Module, request: ExportRequest, file: Path, progress: Callable[[str], None]
) -> tuple[Sizes, tuple[int, ...]]:
    """Write the file; return what sizes it is good for and the shape of the batch that it was recorded with."""
    example = torch.zeros(2 if "batch" in request.dynamic else 1, 3, *request.sides)
    progress(f"recording an image of {request.sides[0]} x {request.sides[1]}")
    if request.format == "onnx":
        from mmvmamba.deployment.onnx import export_onnx

        report = export_onnx(module, example, file, dynamic=request.dynamic)
        return report.sizes, tuple(example.shape)
    recorded = record(module, example, dynamic=request.dynamic)
    if request.format == "torch":
        save_program(recorded, file)
    else:
        progress("compiling (this takes minutes)")
        compile_package(recorded, file)
    return recorded.sizes, recorded.shape


def _opened(file: Path) -> Callable[[Tensor], Any]:
    if file.suffix == ".onnx":
        from mmvmamba.deployment.onnx import open_onnx, run_onnx

        session = open_onnx(file)
        return lambda image: run_onnx(session, image)
    return load_package(file) if is_compiled_package(file) else load_program(file)


def _description(
    network: Network, part: Part, request: ExportRequest, export: Export, shape: Sequence[int]
) -> dict[str, Any]:
    settings = network.preprocessor
    return {
        "format": request.format,
        "part": part.name,
        "task": network.task,
        "model": network.name,
        "weights": network.weights,
        "int8_layers": export.quantised,
        "input": {
            "shape": list(shape),
            "free": {name: list(bounds) for name, bounds in export.sizes.items()},
            "channels": "RGB" if settings.get("bgr_to_rgb") or settings.get("to_rgb") else "BGR",
            "mean": [float(value) for value in settings.get("mean") or (0, 0, 0)],
            "std": [float(value) for value in settings.get("std") or (1, 1, 1)],
        },
        "comparison": [asdict(run) for run in export.runs],
        "seconds": round(export.seconds, 1),
        "megabytes": round(export.megabytes, 3),
        "torch": torch.__version__,
        "mmvmamba": __version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Exported:
    """An exported part that was read again.

    Attributes:
        file: Where it is from.
        part: A key of ``PARTS``.
        task: Of the network that it is a part of.
        sizes: Free dimension -> smallest and largest size.
        shape: The batch (b, 3, h, w) whose sizes the others have.
        call: An image batch to what the part gives.
    """

    file: Path
    part: str
    task: str
    sizes: Sizes
    shape: tuple[int, ...]
    call: Callable[[Tensor], Any]

    def run(self, image: Tensor) -> Any:
        """Return what the part makes of an image batch (b, 3, h, w).

        Raises:
            OpInputError: If the file is not good for the size.
        """
        for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
            low, high = self.sizes.get(name, (self.shape[axis], self.shape[axis]))
            size = image.shape[axis]
            if size < low or (high is not None and size > high):
                wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
                raise OpInputError(
                    f"the {name} is {size}, but {str(self.file)!r} was exported for {wanted}. Pad or resize the "
                    "images, or export again with --sides or --fixed changed."
                )
        return self.call(image.contiguous())


def load_exported(path: str | Path) -> Exported:
    """Read an exported part and the description beside it.

    Raises:
        ConfigError: If either cannot be read.
        MissingPackage: If it is an ONNX file and onnxruntime is not installed.
    """
    file = Path(path)
    description = file.with_suffix(file.suffix + ".json")
    try:
        content = json.loads(description.read_text())
        free = {name: (int(low), None if high is None else int(high))
                for name, (low, high) in content["input"]["free"].items()}  # fmt: skip
        part, task, shape = content["part"], content["task"], tuple(content["input"]["shape"])
        kind, made_by = content["format"], content["torch"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{str(description)!r} cannot be read ({error}), expected what export.py writes beside {file.name!r}. Keep "
            "the two together, or export again."
        ) from error
    if part not in PARTS:
        raise ConfigError(f"{str(description)!r}: part is {part!r}, expected one of {', '.join(PARTS)}. Export again.")
    if kind == "aotinductor" and made_by != torch.__version__:
        raise ConfigError(
            f"{str(file)!r} was compiled by PyTorch {made_by}, but this is {torch.__version__}, expected the same. "
            "Compile it again."
        )
    return Exported(file, part, task, free, shape, _opened(file))


class _InPlace(nn.Module):
    """An exported part where a network expects a module."""

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self._exported = exported

    def forward(self, image: Tensor) -> Any:
        # Exports are made for the CPU; what the part does not contain may be on a GPU.
        result = tree_map_only(Tensor, lambda value: value.to(image.device), self._exported.run(image.cpu()))
        return tuple(result) if isinstance(result, list) else result


def put_into(network: nn.Module, exported: Exported) -> None:
    """Replace PyTorch's part of a whole network by an exported one; the network then predicts and is tested as ever.

    Args:
        network: The model of the same config, with its weights: what the part does not contain is used.
        exported: From `load_exported`.
    """
    model: Any = network
    part = _InPlace(exported)
    if exported.part == "segmentor":
        # The decoder's own resizing to the padded size of the image is inside, so nothing is left to do.
        model.encode_decode = lambda inputs, _metas: _single(part(inputs))
        return
    model.backbone = part
    if exported.part != "backbone" and getattr(model, "neck", None) is not None:
        model.neck = nn.Identity()
    if exported.part == "classifier":
        model.head.forward = _single


def _single(result: Any) -> Tensor:
    """Return the one tensor that a part gives: some formats put it into a list."""
    tensor: Tensor = result[0] if isinstance(result, (list, tuple)) else result
    return tensor
