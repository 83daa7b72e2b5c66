"""Which part of a network is measured, as what the analysis tools take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmvmamba.analysis.throughput import Subject
from mmvmamba.apis.networks import Network, checked_device
from mmvmamba.errors import ConfigError

BACKBONE, WHOLE = "backbone", "network"
PARTS = (BACKBONE, WHOLE)


def measured_part(network: Network, part: str, *, train: bool = False) -> Subject:
    """Return a part of a network as the subject of a measurement.

    Args:
        network: From ``load_networks``.
        part: ``"backbone"``, or ``"network"``: of a classifier up to its scores, of a segmentor up to its scores before
            they are resized to the image, of a detector up to its boxes (and masks) after non-maximum suppression.
        train: Whether it is to be trained.

    Raises:
        ConfigError: If ``part`` is unknown, there is no backbone, or a whole detector is to be trained, which would
            need annotated images.
    """
    if part not in PARTS:
        raise ConfigError(f"part is {part!r}, expected one of {', '.join(PARTS)}. Choose one of them.")
    if part == BACKBONE:
        return Subject(network.name, network.backbone, network.backbone)
    model: Any = network.model
    if network.task != "det":
        return Subject(network.name, model, lambda images: model(images, mode="tensor"))
    if train:
        raise ConfigError(
            f"the training step of {network.name} as a whole is asked for, expected a backbone, a classifier or a "
            "segmentor: the losses of a detector need annotated images. Choose --part backbone."
        )
    return Subject(network.name, model, lambda images: model(images, _samples(images), mode="predict"))


def measured_parts(networks: Sequence[Network], part: str, *, train: bool = False) -> list[Subject]:
    """Return the same part of several networks; names of two models that are alike get a number."""
    subjects = [measured_part(network, part, train=train) for network in networks]
    names = [subject.name for subject in subjects]
    return [
        subject
        if names.count(subject.name) == 1
        else Subject(f"{subject.name} ({names[: index + 1].count(subject.name)})", subject.module, subject.run)
        for index, subject in enumerate(subjects)
    ]


def measuring_device(device: str | None) -> torch.device:
    """Return the device of a command line's ``--device``; a ConfigError says that there is no such kind."""
    return torch.device(checked_device(device))


def _samples(images: Tensor) -> list[Any]:
    """Return what a detector wants to know of its images: that they were not resized."""
    from mmdet.structures import DetDataSample

    shape = tuple(images.shape[2:])
    info = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    return [DetDataSample(metainfo=dict(info)) for _ in images]
