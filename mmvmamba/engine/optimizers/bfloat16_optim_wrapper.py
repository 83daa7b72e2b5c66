"""Mixed precision of backbone and neck: for detectors, and for CPUs, which MMEngine's AmpOptimWrapper refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import nn

from mmvmamba.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class Bfloat16OptimWrapper(OptimWrapper):
    """Train with backbone and neck under bfloat16 autocast; heads, losses and weights stay float32.

    That is where the time goes. A detection head cannot be narrowed: mmdet gives its anchors and boxes the type of the
    features (``grid_priors(dtype=...)``, ``rois.type_as(feats)``), and a coordinate of 1000 has steps of 4 pixels in
    bfloat16; mmcv's kernels, RoIAlign, focal loss and non-maximum suppression, take no bfloat16 besides. bfloat16 has
    the range of float32, so there is no loss scale.

    The arguments are those of ``mmengine.optim.OptimWrapper``.
    """

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast what ``model``, or the model in a distributed wrapper, calls ``backbone`` and ``neck``."""
        inner: Any = model.module if is_model_wrapper(model) else model
        parts = [part for name in ("backbone", "neck") if isinstance(part := getattr(inner, name, None), nn.Module)]
        device = next(inner.parameters()).device.type
        with super().optim_context(model), contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(_bfloat16_inside(part, device))
            yield


@contextlib.contextmanager
def _bfloat16_inside(module: nn.Module, device: str) -> Iterator[None]:
    """Run ``module`` under autocast of ``device`` whenever it is called in the block; its results are float32."""
    active: list[torch.autocast] = []

    def enter(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        context = torch.autocast(device, torch.bfloat16)
        context.__enter__()
        active.append(context)

    def leave(_module: nn.Module, _args: tuple[Any, ...], result: Any) -> Any:
        active.pop().__exit__(None, None, None)
        return _as_float32(result)

    # always_call: an exception in the module must not leave autocast on.
    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_float32(result: Any) -> Any:
    """Return tensors of ``result``, which may be nested in tuples, lists and dicts, as float32."""
    if isinstance(result, torch.Tensor):
        return result.float() if result.dtype == torch.bfloat16 else result
    if isinstance(result, (tuple, list)):
        return type(result)(_as_float32(value) for value in result)
    if isinstance(result, dict):
        return {key: _as_float32(value) for key, value in result.items()}
    return result
