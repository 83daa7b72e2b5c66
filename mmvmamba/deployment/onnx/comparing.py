"""An ONNX file in onnxruntime beside the network it was made from: the same numbers, and how long either takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.deployment.onnx.exporting import flat_tensors
from mmvmamba.deployment.onnx.writer import EXTRA
from mmvmamba.errors import ConfigError
from mmvmamba.optional import optional_package


@dataclass(frozen=True)
class OnnxRun:
    """One image batch in both.

    Attributes:
        shape: That of the batch (b, 3, h, w).
        error: The largest difference of any output, relative to the largest value of that output; infinite where a
            value is not finite in one of the two alone or shapes differ.
        pytorch_ms: Fastest time of the network in milliseconds; None where no time was taken.
        onnx_ms: Fastest time of the file in onnxruntime.
    """

    shape: tuple[int, ...]
    error: float
    pytorch_ms: float | None
    onnx_ms: float | None


def compare_onnx(
    module: nn.Module, path: str | Path, images: Sequence[Tensor], *, repeats: int = 0, threads: int | None = None
) -> list[OnnxRun]:
    """Run an ONNX file and the network that it was made from on the same images.

    Args:
        module: The network, as it was exported.
        path: The file.
        images: Batches (b, 3, h, w), float32, of any of the sizes that the file is good for.
        repeats: How often to measure, the two in turn; 0 takes no times.
        threads: That onnxruntime may use; PyTorch's own number if None. (PyTorch's is left as it is.)

    Raises:
        MissingPackage: If onnxruntime is not installed.
        ConfigError: If onnxruntime cannot read or run the file.
    """
    session = open_onnx(path, threads)
    runs = []
    for image in images:
        with torch.inference_mode():
            expected = flat_tensors(module(image))
        error = _error(run_onnx(session, image), expected)
        times: tuple[float | None, float | None] = (None, None)
        if repeats:
            times = _times(partial(module, image), partial(run_onnx, session, image), repeats)
        runs.append(OnnxRun(tuple(image.shape), error, *times))
    return runs


def open_onnx(path: str | Path, threads: int | None = None) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        path: The file.
        threads: How many it may use; as many as PyTorch if None.

    Raises:
        MissingPackage: If onnxruntime is not installed.
        ConfigError: If it cannot read the file.
    """
    onnxruntime = optional_package("onnxruntime", EXTRA)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 3  # its warnings are about its own rewriting of graphs
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common class
        raise ConfigError(
            f"{str(path)!r} cannot be read by onnxruntime ({str(error).splitlines()[0]}), expected an ONNX file. "
            "Export it again."
        ) from error


def run_onnx(session: Any, image: Tensor) -> list[Tensor]:
    """Return what a session makes of an image batch (b, 3, h, w).

    Raises:
        ConfigError: If the batch is not one the file is good for.
    """
    name = session.get_inputs()[0].name
    try:
        outputs = session.run(None, {name: image.detach().numpy()})
    except Exception as error:  # as above
        raise ConfigError(
            f"onnxruntime cannot run an image batch {tuple(image.shape)} ({str(error).splitlines()[0]}), expected one "
            "of the sizes that the file was made for. See OnnxReport.sizes."
        ) from error
    return [torch.from_numpy(output) for output in outputs]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if [value.shape for value in found] != [value.shape for value in expected]:
        return float("inf")
    return max(map(_difference, found, expected), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    if difference == 0:
        return 0.0
    # NaN compares false with everything: it is infinitely wrong.
    return difference / scale if scale > 0 and difference == difference else float("inf")


def _times(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the fastest time of both in milliseconds, run in turn so that what disturbs one disturbs the other."""
    fastest = [float("inf"), float("inf")]
    for _ in range(repeats):
        for i, run in enumerate((first, second)):
            started = time.perf_counter()
            with torch.inference_mode():
                run()
            fastest[i] = min(fastest[i], (time.perf_counter() - started) * 1000)
    return fastest[0], fastest[1]
