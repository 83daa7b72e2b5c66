"""What of a network cannot be written as ONNX, found by looking at its parts."""

from __future__ import annotations

import torch
from torch import nn

from mmvmamba.deployment.parts import obstacles


def unsupported_parts(module: nn.Module) -> list[str]:
    """Return the reasons why a network cannot be written by ``export_onnx``; nothing where it can.

    Costs nothing: no part runs.

    Args:
        module: A backbone, or any network around one that takes an image batch.
    """
    reasons = obstacles(module)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    elsewhere = [f"{name!r} ({value.device})" for name, value in tensors if value.device.type != "cpu"]
    if elsewhere:
        reasons.append(f"{len(elsewhere)} tensors are not on the CPU, such as {elsewhere[0]}: call .cpu()")
    other = [
        f"{name!r} ({value.dtype})" for name, value in tensors
        if value.is_floating_point() and value.dtype != torch.float32
    ]  # fmt: skip
    if other:
        reasons.append(f"{len(other)} tensors are not float32, such as {other[0]}: call .float()")
    return reasons
