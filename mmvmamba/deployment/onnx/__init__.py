"""Backbones and whole networks as ONNX files, for any image size, checked in onnxruntime.

``export_onnx`` writes, ``compare_onnx`` proves that onnxruntime and PyTorch give the same numbers and says how long
either takes, ``unsupported_parts`` says before all that what of a network cannot be written. Needs the packages of
the extra ``export``.
"""

from mmvmamba.deployment.onnx.comparing import compare_onnx, open_onnx, run_onnx
from mmvmamba.deployment.onnx.exporting import OnnxReport, export_onnx
from mmvmamba.deployment.onnx.support import unsupported_parts

__all__ = [
    "OnnxReport",
    "compare_onnx",
    "export_onnx",
    "open_onnx",
    "run_onnx",
    "unsupported_parts",
]
