"""The backbones that are compared, built alike: four feature maps, no weights loaded, the same drop path."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import DisagreementError, check
from mmvmamba.models import VMamba
from mmvmamba.ops import use_backend

DROP_PATH = 0.1
STRIDES = (4, 8, 16, 32)

_VMAMBA: dict[str, str] = {
    "nano": "nano",
    "tiny": "tiny-s1l8",
    "small": "small-s1l20",
    "base": "base-s1l20",
}
_SWIN: dict[str, dict[str, Any]] = {
    "nano": dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    "tiny": dict(),
    "small": dict(depths=(2, 2, 18, 2)),
    "base": dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
_CONVNEXT: dict[str, Any] = {
    "nano": dict(depths=[1, 1, 2, 1], channels=[32, 64, 128, 256]),
    "tiny": "tiny",
    "small": "small",
    "base": "base",
}
VARIANTS = tuple(_VMAMBA)

BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-2}
"""Largest error of VMamba's features and of the gradient of its image against the reference in float64."""


def build_vmamba(variant: str) -> nn.Module:
    """Our VMamba [s1l...]."""
    return VMamba(_VMAMBA[variant], drop_path_rate=DROP_PATH)


def build_swin(variant: str) -> nn.Module:
    """The Swin Transformer of mmdet."""
    from mmdet.models.backbones import SwinTransformer

    model: nn.Module = SwinTransformer(drop_path_rate=DROP_PATH, **_SWIN[variant])
    return model


def build_convnext(variant: str) -> nn.Module:
    """The ConvNeXt of mmpretrain as a dense feature extractor (its default pools every map to one pixel)."""
    from mmpretrain.models.backbones import ConvNeXt

    model: nn.Module = ConvNeXt(
        _CONVNEXT[variant], out_indices=(0, 1, 2, 3), drop_path_rate=DROP_PATH, gap_before_final_norm=False
    )
    return model


@dataclass(frozen=True)
class Peer:
    """A backbone.

    Attributes:
        name: As printed.
        build: From the name of a variant.
        needs: The module it comes from.
        note: Follows the name.
        setting: Entered around every run.
    """

    name: str
    build: Callable[[str], nn.Module]
    needs: str
    note: str = ""
    setting: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

    def label(self, variant: str) -> str:
        """Name with variant, such as Swin-T."""
        return f"{self.name}-{variant if variant == 'nano' else variant[0].upper()}{self.note}"

    def problem(self) -> str | None:
        """Why it cannot be built here, or None."""
        return None if importlib.util.find_spec(self.needs) is not None else f"there is no module {self.needs}"


_ONEDNN = "mmvmamba.models.layers.onednn"


def _without_onednn() -> contextlib.AbstractContextManager[object]:
    """Let VMamba's linear maps take PyTorch's own way, as those of the other models do."""
    setting: contextlib.AbstractContextManager[object] = importlib.import_module(_ONEDNN).use_onednn_linear(False)
    return setting


PEERS = {
    "vmamba": Peer("VMamba", build_vmamba, "mmvmamba"),
    # Shows how much of a difference to the others is the GEMM library and not the model.
    "vmamba-pytorch": Peer("VMamba", build_vmamba, _ONEDNN, ", PyTorch linears", _without_onednn),
    "swin": Peer("Swin", build_swin, "mmdet"),
    "convnext": Peer("ConvNeXt", build_convnext, "mmpretrain"),
}


def parse_size(text: str) -> tuple[int, int]:
    """Read ``224`` or ``800x1216`` (rows x columns).

    Raises:
        ValueError: It is neither.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(
            f"size is {text!r}, expected a side such as 224 or rows x columns such as 800x1216. Correct it."
        )
    return int(sides[0]), int(sides[-1])


def check_shapes(
    name: str, outputs: Sequence[Tensor], height: int, width: int, strides: Sequence[int] = STRIDES
) -> None:
    """Compare feature maps with their strides.

    Raises:
        DisagreementError: One has another size, or a value that is not finite.
    """
    found = [tuple(out.shape[2:]) for out in outputs]
    # Some round a map down where others round up, and patches that overlap leave out one more.
    fits = len(found) == len(strides) and all(
        max(side // stride - 1, 1) <= size <= -(-side // stride)
        for shape, stride in zip(found, strides, strict=True)
        for size, side in zip(shape, (height, width), strict=True)
    )
    if not fits:
        raise DisagreementError(f"{name}: maps are {found}, expected strides {tuple(strides)} of {height}x{width}")
    if not all(bool(out.isfinite().all()) for out in outputs):
        raise DisagreementError(f"{name}: a feature is not finite")


def check_vmamba(peer: Peer, variant: str, dtype: torch.dtype, bound: float | None = None) -> None:
    """Compare VMamba in the timed precision with itself in float64 on the reference path, at 64x96, gradient included.

    Args:
        peer: VMamba, or a relative of it.
        variant: Its arch.
        dtype: The timed precision.
        bound: Largest difference relative to the largest value; None for that of VMamba in this precision.

    Raises:
        DisagreementError: They differ.
    """
    model = peer.build(variant)
    _randomise(model)
    model.eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        weights = [torch.randn(out.shape) for out in model(image)]
    with peer.setting():
        found = _features_and_gradient(model, image, dtype, weights)
    with use_backend("reference"):
        expected = _features_and_gradient(model.double(), image.double(), torch.float64, weights)
    check(peer.label(variant), found, expected, dict.fromkeys(expected, BOUND[dtype] if bound is None else bound))


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Draw weights with which every branch matters; at their start, the residual way hides what a scan computes."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def _features_and_gradient(
    model: nn.Module, image: Tensor, dtype: torch.dtype, weights: Sequence[Tensor]
) -> dict[str, Tensor]:
    image = image.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outs = model(image)
    (gradient,) = torch.autograd.grad(outs, [image], [w.to(o.dtype) for w, o in zip(weights, outs, strict=True)])
    return {f"map {i}": out.detach() for i, out in enumerate(outs)} | {"gradient of the image": gradient}
