"""The text of a ``NonFiniteLossError``: what a person needs to find the cause."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine import dist
from torch import Tensor

_LISTED = 10
#: Bytes of one process' part of the report; a fixed size, because processes exchange it as one tensor. No pickle.
_REPORT_BYTES = 8192


@dataclass
class Pass:
    """One forward pass since the last optimizer step; there are several when gradients are accumulated.

    Attributes:
        iteration: Counted from 1.
        losses: Mean of each term that enters the total loss.
        images: The names of its images, filled in when the batch is let go of.
        bad_images: A phrase for each image that is not finite itself.
    """

    iteration: int
    losses: dict[str, Tensor] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    bad_images: list[str] = field(default_factory=list)


def local_report(passes: Sequence[Pass]) -> str:
    """Return what this process has seen since the last step: the losses and images of each pass."""
    lines = []
    for one in passes:
        losses = ", ".join(f"{name} {value.item():.6g}" for name, value in one.losses.items()) or "none seen"
        lines.append(f"  iteration {one.iteration}: losses: {losses}")
        lines.append(f"    images: {shortened(one.images) or 'unknown, the samples carry no names'}")
        if one.bad_images:
            lines.append(f"    not finite before the model: {shortened(one.bad_images)}")
    return "\n".join(lines)


def gathered(text: str, device: torch.device) -> str:
    """Return the texts of all processes under their ranks; every process must call this."""
    if dist.get_world_size() == 1:
        return text
    data = text.encode()[:_REPORT_BYTES]
    buffer = torch.zeros(_REPORT_BYTES, dtype=torch.uint8)
    buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = dist.all_gather(buffer.to(device))
    texts = [bytes(part.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for part in parts]
    return "\n".join(f" rank {rank}:\n{part}" for rank, part in enumerate(texts))


def bad_gradients(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return a phrase for every parameter whose gradient is not finite."""
    phrases = []
    for name, parameter in parameters.items():
        if (gradient := dense_gradient(parameter)) is None or gradient.isfinite().all():
            continue
        nans, infinities = int(gradient.isnan().sum()), int(gradient.isinf().sum())
        phrases.append(f"{name} ({nans} NaN, {infinities} infinite of {gradient.numel()})")
    return phrases


def bad_weights(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that are not finite themselves: then the damage is older than this step."""
    return [name for name, parameter in parameters.items() if not parameter.isfinite().all()]


def dense_gradient(parameter: Tensor) -> Tensor | None:
    """Return the gradient of a parameter, of a sparse one the entries that are there, or None."""
    gradient = parameter.grad
    if gradient is None:
        return None
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def settings(param_groups: Iterable[Mapping[str, Any]], scale: float | None) -> str:
    """Return learning rates and loss scale as a line."""
    rates = sorted({float(group["lr"]) for group in param_groups if "lr" in group})
    ends = dict.fromkeys((rates[0], rates[-1])) if rates else {}
    text = "  learning rate " + (" to ".join(f"{rate:.4g}" for rate in ends) or "unknown")
    return text if scale is None else f"{text}, loss scale {scale:g}"


def shortened(phrases: Sequence[str], separator: str = ", ") -> str:
    """Return the first ten phrases and how many more there are."""
    more = [f"and {len(phrases) - _LISTED} more"] if len(phrases) > _LISTED else []
    return separator.join([*phrases[:_LISTED], *more])
