"""What of a classifier, detector or segmentor can be exported: the parts that map an image batch to tensors.

Boxes, masks and labels come of Python code with loops over what was found. They stay where they are, and
``mmvmamba.apis.deployment`` puts an exported part into their network in the place of PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import BackendError, ConfigError
from mmvmamba.ops.backends import choose_backend

#: Name of a part -> the tasks whose networks have it.
PARTS: dict[str, tuple[str, ...]] = {
    "backbone": ("cls", "det", "seg"),
    "backbone-neck": ("det", "seg"),
    "classifier": ("cls",),
    "segmentor": ("seg",),
}


@dataclass(frozen=True)
class Part:
    """A part of a network.

    Attributes:
        name: A key of ``PARTS``.
        module: Takes an image batch (b, 3, h, w), as the network's data preprocessor gives it, in evaluation form. The
            first two parts return a tuple of maps (b, c, h', w'), the finest first, ``"classifier"`` scores before the
            softmax (b, classes), ``"segmentor"`` scores (b, classes, h, w) of the image's own size.
    """

    name: str
    module: nn.Module


class _Features(nn.Module):
    """The maps of a backbone, or of the neck behind it, as a tuple."""

    def __init__(self, backbone: nn.Module, neck: nn.Module | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = self.backbone(image)
        if self.neck is not None:
            maps = self.neck(maps)
        return tuple(maps)


class _Scores(nn.Module):
    """The scores of a classifier before the softmax."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.backbone = network.backbone
        self.neck = network.neck if network.with_neck else None
        self.head = network.head

    def forward(self, image: Tensor) -> Tensor:
        maps = self.backbone(image)
        if self.neck is not None:
            maps = self.neck(maps)
        scores: Tensor = self.head(maps)
        return scores


class _PixelScores(nn.Module):
    """The scores of a segmentor's decoder for every pixel of the image."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.features = _Features(network.backbone, network.neck if network.with_neck else None)
        self.decode_head = network.decode_head
        self.align_corners = bool(network.align_corners)

    def forward(self, image: Tensor) -> Tensor:
        scores = self.decode_head(self.features(image))
        return F.interpolate(scores, size=image.shape[2:], mode="bilinear", align_corners=self.align_corners)


def part_of(network: nn.Module, task: str, name: str) -> Part:
    """Return a part of a whole network; the parameters are shared.

    Args:
        network: A classifier, detector or segmentor in evaluation form.
        task: ``"cls"``, ``"det"`` or ``"seg"``.
        name: A key of ``PARTS``.

    Raises:
        ConfigError: If the network has no such part, or the part cannot be exported for a reason that can be seen.
    """
    if name not in PARTS:
        raise ConfigError(f"part is {name!r}, expected one of {', '.join(map(repr, PARTS))}. Correct it.")
    if task not in PARTS[name]:
        possible = [part for part, tasks in PARTS.items() if task in tasks]
        raise ConfigError(
            f"part is {name!r}, which a network of the task {task!r} does not have, expected one of "
            f"{', '.join(map(repr, possible))}. Name one of these."
        )
    part = Part(name, _MAKERS[name](network))
    part.module.eval()
    reasons = obstacles(part.module)
    if reasons:
        raise ConfigError(
            f"the {name} of this {type(network).__name__} cannot be exported: {'; '.join(reasons)}. Expected a part "
            "without these. Choose another part or model."
        )
    return part


def obstacles(module: nn.Module) -> list[str]:
    """Return why a module cannot be exported, as far as its parts show without running it; nothing where none does.

    Args:
        module: What is to be exported.
    """
    reasons = []
    own = [f"{path} ({type(part).__name__})" for path, part in module.named_modules() if _is_of_mmcv_operator(part)]
    if own:
        reasons.append(f"{len(own)} layers run operators of mmcv that no exporter knows, such as {own[0]}")
    if any(part.training for part in module.modules()):
        reasons.append("it is in training mode, call eval() first")
    try:
        choice = choose_backend(None, "cpu")
    except BackendError as error:
        reasons.append(str(error))
    else:
        if choice.name == "reference" and choice.pinned:
            reasons.append(
                "the backend 'reference' was asked for by name, which would record every step of a scan; unset "
                "MMVMAMBA_BACKEND"
            )
    return reasons


def _is_of_mmcv_operator(part: nn.Module) -> bool:
    return type(part).__module__.startswith("mmcv.ops.")


def _backbone(network: nn.Module) -> nn.Module:
    backbone = getattr(network, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ConfigError(
            f"model is a {type(network).__name__} without a backbone, expected one that has it. Name another model."
        )
    return backbone


def _make_backbone(network: nn.Module) -> nn.Module:
    return _Features(_backbone(network), None)


def _make_neck(network: nn.Module) -> nn.Module:
    neck = getattr(network, "neck", None)
    if not isinstance(neck, nn.Module):
        raise ConfigError(
            f"part is 'backbone-neck', but this {type(network).__name__} has no neck. Choose the part 'backbone'."
        )
    return _Features(_backbone(network), neck)


def _make_classifier(network: nn.Module) -> nn.Module:
    _backbone(network)
    if not isinstance(getattr(network, "head", None), nn.Module):
        raise ConfigError(
            f"part is 'classifier', but this {type(network).__name__} has no head. Choose the part 'backbone'."
        )
    return _Scores(network)


def _make_segmentor(network: nn.Module) -> nn.Module:
    _backbone(network)
    head = getattr(network, "decode_head", None)
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
        raise ConfigError(
            f"part is 'segmentor', but the decode_head of this {type(network).__name__} is a {type(head).__name__}, "
            "expected one head such as UPerHead. Choose the part 'backbone'."
        )
    return _PixelScores(network)


_MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "backbone": _make_backbone,
    "backbone-neck": _make_neck,
    "classifier": _make_classifier,
    "segmentor": _make_segmentor,
}
