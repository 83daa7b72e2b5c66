"""Answers of a trained model for pictures: files, folders and arrays, for all three tasks in the same words.

The toolboxes' own inferencers do the work (``DetInferencer``, ``MMSegInferencer``, ``ImageClassificationInferencer``).
What is added: model names of this project, one form of inputs and answers, weights that are read safely and checked
whole before they are loaded, and class names that are never those of another data set.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from torch import nn

from mmvmamba.analysis.predictions import (
    Image,
    Picture,
    Prediction,
    classification_record,
    detection_record,
    pictures,
    segmentation_record,
)
from mmvmamba.apis.class_names import bare_name
from mmvmamba.apis.networks import (
    SCOPES,
    build_network,
    checked_device,
    load_network,
    place_network,
    resolve_config,
)
from mmvmamba.errors import CheckpointError, ConfigError, nearest_spelling

_VISUALIZERS = {"det": "DetLocalVisualizer", "seg": "SegLocalVisualizer"}
#: Height and width.
Shape = tuple[int, int]


def inferencer(
    task: str,
    model: str | Path | Config,
    weights: str | Path | None = None,
    device: str | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> Inferencer:
    """Return what answers for pictures.

    Args:
        task: ``"det"``, ``"seg"`` or ``"cls"``.
        model: A name of the model index (configs/README.md lists them), a config file, or a config.
        weights: A file or an https URL; None for the official weights of a name of the index.
        device: Such as ``"cuda:0"`` or ``"cpu"``; by default the accelerator, if there is one.
        classes: Names of the classes; by default those in the checkpoint, else those of the config's data set.

    Raises:
        ConfigError: If the task, the model or the device is unknown, the config is of another task, or there are not
            as many names as classes.
        CheckpointError: If there are no weights or they cannot be read.
        CheckpointMismatch: If the weights are not those of the whole model; nothing is loaded then.
    """
    if task not in SCOPES:
        raise ConfigError(
            f"task is {task!r}, expected one of {', '.join(map(repr, SCOPES))}.{nearest_spelling(task, SCOPES)} "
            "Name one of them."
        )
    device = checked_device(device)
    cfg, known, name = resolve_config(task, model)
    source = str(weights) if weights is not None else known
    if source is None:
        raise CheckpointError(
            f"weights is None, expected a file or an https URL: {name} brings no official weights. Name the checkpoint."
        )
    with DefaultScope.overwrite_default_scope(SCOPES[task]):
        network = build_network(cfg)
        line, meta = load_network(network, source)
        names, palette = _class_names(cfg, meta, classes)
        network = place_network(network, device)
        network.dataset_meta = {"classes": names, "palette": palette or _palette(len(names))}  # type: ignore[assignment]
        toolbox = _TOOLBOXES[task](_without_annotations(cfg), network, device)
    return Inferencer(task, toolbox, names, line)


@dataclass(frozen=True)
class Inferencer:
    """A model, ready to answer; made by ``inferencer``.

    Attributes:
        task: ``"det"``, ``"seg"`` or ``"cls"``.
        toolbox: The inferencer of MMDetection, MMSegmentation or MMPretrain, for everything that is not here.
        classes: The names of the classes.
        weights: One line about what was loaded.
    """

    task: str
    toolbox: Any
    classes: tuple[str, ...]
    weights: str

    def __call__(
        self,
        inputs: Any,
        *,
        batch_size: int = 1,
        draw: bool = False,
        score_threshold: float = 0.3,
        out_dir: str | Path | None = None,
    ) -> list[Prediction]:
        """Return the answers for all pictures, in their order; arguments and errors are those of ``stream``."""
        stream = self.stream(inputs, batch_size=batch_size, draw=draw, score_threshold=score_threshold, out_dir=out_dir)
        return list(stream)

    def stream(
        self,
        inputs: Any,
        *,
        batch_size: int = 1,
        draw: bool = False,
        score_threshold: float = 0.3,
        out_dir: str | Path | None = None,
    ) -> Iterator[Prediction]:
        """Yield the answers one by one, so that a folder of any size fits the memory.

        Args:
            inputs: A file, a folder, an array (h, w, 3) of uint8 in the order BGR, or a sequence of these.
            batch_size: How many pictures go through the model together at most. Segmentors and classifiers take
                only pictures that have the same size after the config's resizing together.
            draw: Whether to draw the answers.
            score_threshold: Objects below this score are not drawn; the records have all of them.
            out_dir: Where the answers are written as files, see ``Prediction.save``; by default nowhere.

        Raises:
            ConfigError: If ``batch_size`` or ``score_threshold`` is out of range.
            DataError: If an input does not exist or is no image.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}, expected a whole number from 1. Correct it.")
        if not 0 <= score_threshold <= 1:
            raise ConfigError(f"score_threshold is {score_threshold!r}, expected a number from 0 to 1. Correct it.")
        return self._stream(pictures(inputs), batch_size, draw, score_threshold, out_dir)

    def _stream(
        self, found: list[Picture], batch_size: int, draw: bool, score_threshold: float, out_dir: str | Path | None
    ) -> Iterator[Prediction]:
        for batch in self._batches(found, batch_size):
            with DefaultScope.overwrite_default_scope(SCOPES[self.task]):
                collate = default_collate if self.task == "cls" else self.toolbox.collate_fn
                samples = self.toolbox.forward(collate([data for _, _, data in batch]))
            for (picture, shape, _), sample in zip(batch, samples, strict=True):
                answer = self._answer(picture, shape, sample.cpu())
                if draw:
                    answer = replace(answer, drawing=self.draw(picture.read(), answer.sample, score_threshold))
                if out_dir is not None:
                    answer.save(out_dir)
                yield answer

    def _batches(self, found: list[Picture], batch_size: int) -> Iterator[list[tuple[Picture, Shape, Any]]]:
        """Yield pictures with their shapes and what the config's test pipeline makes of them."""
        batch: list[tuple[Picture, Shape, Any]] = []
        for picture in found:
            shape, data = self._processed(picture)
            # mmdet pads the pictures of a batch to the largest, the others do not.
            other = self.task != "det" and batch and batch[-1][2]["inputs"].shape != data["inputs"].shape
            if other:
                yield batch
                batch = []
            batch.append((picture, shape, data))
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _processed(self, picture: Picture) -> tuple[Shape, Any]:
        image = picture.read()  # also what finds a damaged file, with its name
        shape = (image.shape[0], image.shape[1])
        if self.task != "cls":
            return shape, self.toolbox.pipeline(picture.given)
        return shape, self.toolbox.pipeline(dict(img=image, img_shape=shape, ori_shape=shape))

    def _answer(self, picture: Picture, shape: Shape, sample: Any) -> Prediction:
        labels = sample.pred_sem_seg.data[0].numpy() if self.task == "seg" else None
        if labels is not None:
            record = segmentation_record(labels, self.classes)
        elif self.task == "det":
            record = detection_record(sample, self.classes)
        else:
            record = classification_record(sample, self.classes)
        record = {"source": picture.source, "height": shape[0], "width": shape[1], **record}
        return Prediction(picture.source, picture.name, record, sample, labels)

    def draw(self, image: Image, sample: Any, score_threshold: float) -> Image:
        """Return a picture with an answer drawn in, (h, w, 3) uint8 in the order RGB.

        Args:
            image: (h, w, 3) uint8 in the order BGR.
            sample: The answer, as in ``Prediction.sample``.
            score_threshold: Objects below this score are not drawn.
        """
        canvas, visualizer = image[..., ::-1].copy(), self.toolbox.visualizer
        if self.task == "cls":
            visualizer.visualize_cls(canvas, sample, classes=self.classes, draw_gt=False)
        elif self.task == "det":
            visualizer.add_datasample("", canvas, sample, draw_gt=False, pred_score_thr=score_threshold)
        else:
            visualizer.add_datasample("", canvas, sample, draw_gt=False)
        drawn: Image = visualizer.get_image()
        return drawn


def _class_names(
    cfg: Config, meta: Mapping[str, Any], given: Sequence[str] | None
) -> tuple[tuple[str, ...], list[Any] | None]:
    """Return the names of the classes and their colours, if there are any.

    The toolboxes take COCO's or Cityscapes' names where a checkpoint has none; here the config's data set is asked.
    """
    stored = {str(key).lower(): value for key, value in dict(meta.get("dataset_meta") or {}).items()}
    if not stored and "CLASSES" in meta:
        stored = {"classes": meta["CLASSES"], "palette": meta.get("PALETTE")}
    dataset = _metainfo(cfg)
    wanted = _number_of_classes(cfg)
    for origin, names in (
        ("classes", given),
        ("the checkpoint", stored.get("classes")),
        ("the config's data set", dataset.get("classes")),
    ):
        if names is None:
            continue
        if isinstance(names, str):
            raise ConfigError(
                f"the classes of {origin} are the text {names!r}, expected a sequence of names. A single class needs a "
                "comma: ('name',)."
            )
        if wanted is not None and len(names) != wanted:
            raise ConfigError(
                f"{origin} has {len(names)} class names, expected {wanted}, as the model has classes. Name them with "
                "classes=[...]."
            )
        palette = next((p for p in (stored.get("palette"), dataset.get("palette")) if _fits(p, len(names))), None)
        return tuple(map(str, names)), palette
    if wanted is None:
        raise ConfigError(
            "neither the checkpoint nor the config's data set has names of the classes, expected them in one of the "
            "two. Name them with classes=[...]."
        )
    warnings.warn(
        "neither the checkpoint nor the config's data set has names of the classes: they are called by their numbers. "
        "Name them with classes=[...].",
        stacklevel=4,
    )
    return tuple(map(str, range(wanted))), None


def _fits(palette: Any, count: int) -> bool:
    return isinstance(palette, (list, tuple)) and len(palette) == count


def _number_of_classes(cfg: Config) -> int | None:
    """Return how many classes the heads of a model distinguish, or None for heads of an unknown build."""
    model = cfg.model
    while isinstance(model.get("detector"), dict):
        model = model["detector"]
    heads = [model.get("bbox_head"), (model.get("roi_head") or {}).get("bbox_head")]
    heads += [model.get("decode_head"), model.get("head")]
    for head in heads:
        last = head[-1] if isinstance(head, (list, tuple)) and head else head
        if isinstance(last, dict) and last.get("num_classes") is not None:
            return int(last["num_classes"])
    return None


def _metainfo(cfg: Config) -> dict[str, Any]:
    """Return what the config's test data set says of itself, without reading any of its files."""
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    while isinstance(dataset.get("dataset"), dict):
        dataset = dataset["dataset"]
    kind = dataset.get("type")
    if isinstance(kind, str):
        # Of the library whose scope is the default one; without this, MMEngine looks among its own.
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    return {**getattr(kind, "METAINFO", {}), **(dataset.get("metainfo") or {})}


def _palette(count: int) -> list[tuple[int, int, int]]:
    """Return colours (RGB) of a class each, far from each other in hue, always the same."""
    import colorsys

    golden = 0.618034  # steps of the golden ratio spread over the circle for any number
    return [
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb(index * golden % 1, 0.75, 0.95))  # type: ignore[misc]
        for index in range(count)
    ]


def _without_annotations(cfg: Config) -> Config:
    """Return the config with a test pipeline that needs a picture and nothing else."""
    dataset = cfg.test_dataloader.dataset
    while isinstance(dataset.get("dataset"), dict):
        dataset = dataset["dataset"]
    steps = [dict(step) for step in dataset.pipeline if "Annotation" not in bare_name(step["type"])]
    for step in steps:
        if bare_name(step["type"]) == "LoadImageFromFile":
            step["type"] = "LoadImageFromFile"  # the toolboxes look for it under this name
    dataset.pipeline = steps
    cfg.test_dataloader.dataset = dataset
    return cfg


def _around(base: type, model: nn.Module) -> type:
    """Return a toolbox's inferencer that takes a model as it is."""

    class Ready(base):
        def _init_model(self, *_: Any) -> nn.Module:
            return model

        def _init_collate(self, cfg: Config) -> Any:
            # MMEngine warns of the registry where the config names no function.
            return super()._init_collate(cfg) if "collate_fn" in cfg.test_dataloader else pseudo_collate

    return Ready


def _detector(cfg: Config, model: nn.Module, device: str) -> Any:
    from mmdet.apis import DetInferencer

    return _around(DetInferencer, model)(_drawable(cfg, "det"), device=device, scope="mmdet", show_progress=False)


def _segmentor(cfg: Config, model: nn.Module, device: str) -> Any:
    from mmseg.apis import MMSegInferencer

    meta: Any = model.dataset_meta
    return _around(MMSegInferencer, model)(
        _drawable(cfg, "seg"), device=device, scope="mmseg", show_progress=False, **meta
    )


def _classifier(cfg: Config, model: nn.Module, device: str) -> Any:  # noqa: ARG001 - the model is there already
    from mmpretrain.apis import ImageClassificationInferencer
    from mmpretrain.visualization import UniversalVisualizer

    model._config, model._dataset_meta = cfg, model.dataset_meta
    toolbox = ImageClassificationInferencer(model, pretrained=False)
    toolbox.visualizer = UniversalVisualizer()
    return toolbox


_TOOLBOXES = {"det": _detector, "seg": _segmentor, "cls": _classifier}


def _drawable(cfg: Config, task: str) -> Config:
    """Return the config with a visualizer that only draws: those of a config may log to a server."""
    cfg.setdefault("visualizer", ConfigDict(type=_VISUALIZERS[task]))
    cfg.visualizer.vis_backends = []
    return cfg


__all__ = ["SCOPES", "Inferencer", "Prediction", "inferencer"]
