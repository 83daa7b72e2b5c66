"""An ONNX file in onnxruntime beside the network it was made from: the same numbers, and how long either takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.deployment.checks import Run, compare
from mmvmamba.deployment.onnx.writer import EXTRA
from mmvmamba.errors import ConfigError
from mmvmamba.optional import optional_package


def compare_onnx(
    module: nn.Module, path: str | Path, images: Sequence[Tensor], *, repeats: int = 0, threads: int | None = None
) -> list[Run]:
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
    return compare(module, partial(run_onnx, open_onnx(path, threads)), images, repeats=repeats)


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
