"""What the demo page does when a button is pressed, without the page: models, answers, tables and scan maps.

The page itself is ``mmvmamba/apis/app_page.py``.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmvmamba.analysis.images import enlarged, shrunk
from mmvmamba.analysis.painting import paint_objects
from mmvmamba.analysis.predictions import Image, Picture, Prediction
from mmvmamba.apis.demo import STAGES
from mmvmamba.apis.inferencers import Inferencer, inferencer
from mmvmamba.apis.model_index import index_root, list_models
from mmvmamba.apis.networks import Network, checked_device, resolve_config
from mmvmamba.errors import CheckpointError, ConfigError, DataError
from mmvmamba.files import is_file

#: Task -> what the page calls it, in the order of the page.
TASKS = {"det": "Objects", "seg": "Segments", "cls": "Class"}
#: How many models stay in memory; one more and the one that was not asked for longest is forgotten.
KEPT = 2
#: Longest side of a picture, in pixels; longer ones are shrunk, for a scan over 12 megapixels takes minutes on a CPU.
MAX_SIDE = 1024
#: Longest side that drawings of small pictures are enlarged to, about.
SHOWN_SIDE = 512


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer.

    Attributes:
        answers: What answers for pictures.
        network: The same model, for what looks inside of it.
        seconds: What building it and reading its weights took.
    """

    answers: Inferencer
    network: Network
    seconds: float


@dataclass(frozen=True)
class Table:
    """A table of texts: what it shows, the heads of its columns and its rows."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Request:
    """What the page is asked: a model of a task, and which file its weights are in.

    Attributes:
        task: ``"det"``, ``"seg"`` or ``"cls"``.
        model: A name of the model index, or a config file.
        weights: A checkpoint file or https URL; empty for the official weights of a name of the index.
    """

    task: str
    model: str
    weights: str

    def __post_init__(self) -> None:
        """Refuse what the page cannot send, but a program can."""
        if self.task not in TASKS:
            raise ConfigError(f"task is {self.task!r}, expected one of {', '.join(map(repr, TASKS))}. Name one.")
        if not self.model:
            raise ConfigError("model is empty, expected a name of the list or a config file. Choose a model.")


@dataclass(frozen=True)
class Answer:
    """What the page shows of one picture.

    Attributes:
        request: What was asked.
        picture: The picture as it went in, (h, w, 3) uint8 in the order BGR, shrunk if it was too large.
        drawing: The picture with the answer, (h, w, 3) uint8 in the order RGB.
        table: The classes.
        timing: How long it took, in words.
        pixel: Row and column of the pixel to look at first in scan maps: the middle of the surest object, else of the
            picture.
    """

    request: Request
    picture: Image
    drawing: Image
    table: Table
    timing: str
    pixel: tuple[int, int]


class Models:
    """The models of the page, built when they are asked for and kept as long as there is room.

    Args:
        demo_dir: Work folder of ``make demo``, whose checkpoints are offered first.
        device: Such as ``"cuda:0"``; by default the accelerator, if there is one.
        typed_configs: Whether config files that are not offered may be named. A config is Python, which runs when it is
            read: False where others than the owner of this process reach the page.
        uploads: The folder of what the page was sent, from where no config is read.

    Raises:
        ConfigError: If there is no such kind of device.
    """

    def __init__(
        self,
        demo_dir: str | Path,
        device: str | None = None,
        *,
        typed_configs: bool = True,
        uploads: str | Path | None = None,
    ) -> None:
        self.demo_dir = Path(demo_dir)
        self.device = checked_device(device)
        self.typed_configs = typed_configs
        self.uploads = None if uploads is None else Path(uploads).resolve()
        self._loaded: OrderedDict[tuple[Any, ...], Loaded] = OrderedDict()

    def names(self, task: str) -> list[str]:
        """Return the models to choose from: the config of the demo's, then the names of the model index."""
        return [str(demo_config(task)), *(entry.name for entry in list_models(task))]

    def first_weights(self, task: str, model: str) -> str:
        """Return the weights to offer for a model: the demo's checkpoint for its config, else nothing."""
        if model != str(demo_config(task)):
            return ""
        pointer = self.demo_dir / task / "last_checkpoint"
        if not pointer.is_file():
            return ""
        # MMEngine writes where the file was when it was saved; the folder may have been moved since.
        path = self.demo_dir / task / Path(pointer.read_text().strip()).name
        return str(path) if path.is_file() else ""

    def first_task(self) -> str:
        """Return the task to offer first: the first whose demo is trained."""
        return next((task for task in TASKS if self.first_weights(task, str(demo_config(task)))), next(iter(TASKS)))

    def get(self, request: Request) -> Loaded:
        """Return a model, built now if it is not in memory or one of its files has changed.

        Raises:
            ConfigError: If the model is unknown or of another task, or its config may not be run.
            CheckpointError: If there are no weights or they cannot be read.
            CheckpointMismatch: If the weights are not those of the whole model.
        """
        key = (request, _signature(request.model), _signature(request.weights))
        if key not in self._loaded:
            if not request.weights and request.model == str(demo_config(request.task)):
                raise CheckpointError(
                    "weights is empty, expected the path of a checkpoint: nobody publishes weights of the demo's "
                    "models. Train them with `make demo`, or type the path of yours."
                )
            self._check_config(request)
            started = time.perf_counter()
            model = Path(request.model) if is_file(request.model) else request.model
            answers = inferencer(request.task, model, request.weights or None, self.device)
            cfg, _, _ = resolve_config(request.task, model)
            network = Network(Path(request.model).stem, cfg, answers.toolbox.model, answers.weights)
            while len(self._loaded) >= KEPT:
                self._loaded.popitem(last=False)
            self._loaded[key] = Loaded(answers, network, time.perf_counter() - started)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _check_config(self, request: Request) -> None:
        """Refuse a config file that somebody else than the owner of this process may have written."""
        if not is_file(request.model) or request.model in self.names(request.task):
            return
        file = Path(request.model).resolve()
        mine = {os.getuid(), index_root().stat().st_uid, 0}
        if not self.typed_configs:
            why = "a file that is not of the list, and this page is served to others"
        elif self.uploads is not None and file.is_relative_to(self.uploads):
            why = "a file that was sent to this page"
        elif file.stat().st_uid not in mine:
            why = "a file of another user of this machine"
        else:
            return
        raise ConfigError(
            f"model is {request.model!r}, {why}, expected a model of the list: a config is Python that would run here. "
            "Choose a model of the list, or serve the page to yourself alone and name a config of yours."
        )


def demo_config(task: str) -> Path:
    """Return the config of the demo's model of a task."""
    return index_root() / next(stage.config for stage in STAGES if stage.name == task)


def _signature(name: str) -> tuple[int, int] | None:
    """Return what changes when a file does, None for what is no file."""
    if not is_file(name):
        return None
    status = Path(name).stat()
    return status.st_mtime_ns, status.st_size


def answer(models: Models, request: Request, image: str | Path | None, score_threshold: float) -> Answer:
    """Return what a model says about a picture.

    Args:
        models: Where the model is from.
        request: Which model.
        image: The file of the picture, None where none was chosen.
        score_threshold: Objects below this score are neither drawn nor counted.

    Raises:
        DataError: If there is no picture or it cannot be decoded.
        MMVMambaError: Of the kinds that ``Models.get`` names.
    """
    if image is None:
        raise DataError("there is no picture, expected a file or one of the samples. Choose a sample or upload one.")
    whole = Picture(Path(image).name, "picture", str(image)).read()
    picture = shrunk(whole, MAX_SIDE)
    started = time.perf_counter()
    loaded = models.get(request)
    waited = time.perf_counter() - started
    started = time.perf_counter()
    (prediction,) = loaded.answers(picture, score_threshold=score_threshold)
    answered = time.perf_counter() - started
    drawing = draw(loaded.answers, picture, prediction.sample, score_threshold)
    parts = [f"Answered in {answered * 1000:.0f} ms on {models.device}", _size_in_words(whole, picture)]
    if waited > 0.05:  # else it was in memory
        parts.append(f"loading the model took {loaded.seconds:.1f} s, once. Run again for the time without warming up")
    return Answer(
        request=request,
        picture=picture,
        drawing=drawing,
        table=class_table(prediction, score_threshold),
        timing="; ".join(parts) + ".",
        pixel=first_pixel(prediction),
    )


def draw(answers: Inferencer, picture: Image, sample: Any, score_threshold: float) -> Image:
    """Return an answer drawn into its picture, which is enlarged if it is too small for lines and labels to be seen.

    Args:
        answers: What gave the answer.
        picture: (h, w, 3) uint8 in the order BGR.
        sample: The answer, as in ``Prediction.sample``; it stays as it is.
        score_threshold: Objects below this score are not drawn.

    Returns:
        (factor h, factor w, 3) uint8 in the order RGB, with the factor of ``enlargement(picture)``.
    """
    factor = enlargement(picture)
    if answers.task == "det":
        meta: Any = answers.toolbox.model.dataset_meta
        colours = [tuple(map(int, colour)) for colour in meta["palette"]]
        return paint_objects(
            picture,
            sample.pred_instances,
            answers.classes,
            colours,  # type: ignore[arg-type] # of three numbers each
            score_threshold=score_threshold,
            factor=factor,
        )
    if answers.task == "seg" and factor > 1:
        sample = sample.clone()
        labels = sample.pred_sem_seg.data.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        sample.pred_sem_seg = type(sample.pred_sem_seg)(data=labels)
    return answers.draw(enlarged(picture, factor), sample, score_threshold)


def enlargement(picture: Image) -> int:
    """Return how many times larger than its picture (h, w, 3) a drawing is."""
    return max(round(SHOWN_SIDE / max(picture.shape[:2])), 1)


def _size_in_words(whole: Image, picture: Image) -> str:
    height, width = picture.shape[:2]
    text = f"picture of {width} x {height} pixels"
    if whole.shape != picture.shape:
        text += f", shrunk from {whole.shape[1]} x {whole.shape[0]}"
    return text


def class_table(prediction: Prediction, score_threshold: float) -> Table:
    """Return the classes of an answer, the surest or largest first.

    Args:
        prediction: Of any task.
        score_threshold: Objects below this score are not counted.
    """
    record = prediction.record
    if "instances" in record:
        return _objects_table(record["instances"], score_threshold)
    if prediction.labels is not None:
        pixels = record["height"] * record["width"]
        rows = [(entry["class"], f"{entry['pixels'] / pixels:.1%}") for entry in record["classes"]]
        return Table("Share of the picture by class", ("Class", "Pixels"), tuple(rows))
    rows = [(entry["class"], f"{entry['score']:.3f}") for entry in record["classes"]]
    return Table("The surest classes", ("Class", "Score"), tuple(rows))


def _objects_table(instances: Sequence[dict[str, Any]], score_threshold: float) -> Table:
    counts: dict[str, int] = {}
    best: dict[str, float] = {}
    for instance in instances:  # the surest first
        if instance["score"] >= score_threshold:
            name = instance["class"]
            counts[name] = counts.get(name, 0) + 1
            best.setdefault(name, instance["score"])
    total = sum(counts.values())
    caption = f"{total} object{'' if total == 1 else 's'} of score {score_threshold:.2f} or more"
    rows = tuple((name, str(count), f"{best[name]:.3f}") for name, count in counts.items())
    return Table(caption, ("Class", "Objects", "Best score"), rows)


def first_pixel(prediction: Prediction) -> tuple[int, int]:
    """Return row and column of the middle of the surest object, or of the picture where there is none."""
    height, width = prediction.record["height"], prediction.record["width"]
    instances = prediction.record.get("instances")
    if not instances:
        return height // 2, width // 2
    left, top, right, bottom = instances[0]["bbox"]
    row, column = int((top + bottom) / 2), int((left + right) / 2)
    return min(max(row, 0), height - 1), min(max(column, 0), width - 1)
