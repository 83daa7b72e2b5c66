"""The models there are: name, task, config file, official weights and results, as the metafiles of the configs say.

``model-index.yml`` names the metafiles, ``configs/<task>/<family>/metafile.yml`` hold the models, in the form that
``mim`` and MMEngine read. A checkout has them at its root, a wheel in ``mmvmamba/.mim``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from mmvmamba.errors import ConfigError

Task = Literal["cls", "det", "seg"]
TASKS: tuple[str, ...] = get_args(Task)
Source = Literal["published by upstream", "measured by us"]
SOURCES: tuple[str, ...] = get_args(Source)

INDEX_FILE = "model-index.yml"
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """What a model reached.

    Attributes:
        task: The task in ``mim``'s words, such as ``"Instance Segmentation"``.
        dataset: Such as ``"COCO"``.
        metrics: Name to value, such as ``{"mask AP": 42.7}``.
        source: Who measured it.
        setting: In what it departs from the config, such as another batch size; None where it does not.
    """

    task: str
    dataset: str
    metrics: Mapping[str, float]
    source: Source
    setting: str | None = None


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """One model: a config with what is known of it.

    Attributes:
        name: The stem of the config file.
        task: ``"cls"``, ``"det"`` or ``"seg"``.
        config: The config file.
        weights: URL of the official weights, None where none are published or their address is not known for certain.
        converted_weights: URL of the same weights under our names, None where there are none yet.
        metadata: What else the metafile says: architecture, epochs, parameters, FLOPs.
        results: What the model reached, empty for a recipe without published or measured results.
    """

    name: str
    task: Task
    config: Path
    weights: str | None
    converted_weights: str | None
    metadata: Mapping[str, Any]
    results: tuple[ModelResult, ...]


def index_root() -> Path:
    """Return the folder that holds ``model-index.yml`` and ``configs``: of the wheel, or the checkout's root.

    Raises:
        ConfigError: If there is neither.
    """
    places = (_PACKAGE / ".mim", _PACKAGE.parent)
    for place in places:
        if (place / INDEX_FILE).is_file():
            return (place / INDEX_FILE).resolve().parent
    raise ConfigError(
        f"the list of models: found no {INDEX_FILE} in {' or '.join(repr(str(place)) for place in places)}, expected "
        "that of the wheel or of the checkout. Install mmvmamba again, from a wheel or with 'pip install -e .' in a "
        "checkout."
    )


def list_models(task: str | None = None) -> tuple[ModelEntry, ...]:
    """Return all models, or those of one task, in the order of the metafiles.

    Args:
        task: ``"cls"``, ``"det"``, ``"seg"`` or None.

    Raises:
        ConfigError: If the task is unknown or a metafile is missing or malformed.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"task is {task!r}, expected one of {', '.join(TASKS)}. Correct it or leave it out.")
    return tuple(entry for entry in _read_index(index_root()) if task in (None, entry.task))


def find_model(name: str, task: str | None = None) -> ModelEntry:
    """Return a model by its name.

    Args:
        name: The stem of its config file.
        task: ``"cls"``, ``"det"`` or ``"seg"`` if the model must be one of that task.

    Raises:
        ConfigError: If there is no such model; the message has the names that are nearest to it. If it is a model of
            another task, or the task is unknown.
    """
    models = list_models(task)
    for entry in models:
        if entry.name == name:
            return entry
    for entry in list_models():
        if entry.name == name:
            raise ConfigError(
                f"model {name!r} is one of task {entry.task!r}, expected one of {task!r}. Ask for task {entry.task!r}, "
                f"or take a model of {task!r}{_such_as(name, models)}"
            )
    kind = "" if task is None else f" of task {task!r}"
    raise ConfigError(
        f"model is {name!r}, expected the name of a model{kind}: the stem of a file in configs/. "
        f"Take one of these{_such_as(name, models)}"
    )


def _such_as(name: str, models: Iterable[ModelEntry]) -> str:
    """Return the names that are nearest, as the end of a sentence."""
    names = [entry.name for entry in models]
    # Who writes "vmamba-tiny" is nearer to what begins so than to a shorter name with other letters.
    holding = [each for each in names if name and name.lower() in each.lower()]
    nearest = holding or difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4) or names
    return f", such as {', '.join(map(repr, nearest[:3]))}."


@functools.cache
def _read_index(root: Path) -> tuple[ModelEntry, ...]:
    index = _read_yaml(root / INDEX_FILE)
    entries = [
        _entry(root, root / path, model)
        for path in _list(index, "Import", root / INDEX_FILE)
        for model in _list(_read_yaml(root / path), "Models", root / path)
    ]
    return tuple(entries)


def _entry(root: Path, file: Path, model: Any) -> ModelEntry:
    if not isinstance(model, dict):
        raise _malformed(file, f"an entry of Models is {model!r}, expected a mapping with Name, Task and Config")
    name, task, config = (_text(model, key, file) for key in ("Name", "Task", "Config"))
    if task not in TASKS:
        raise _malformed(file, f"Task of {name!r} is {task!r}, expected one of {', '.join(TASKS)}")
    return ModelEntry(
        name=name,
        task=task,  # type: ignore[arg-type]  # one of TASKS
        config=root / config,
        weights=model.get("Weights"),
        converted_weights=model.get("Converted Weights"),
        metadata=dict(model.get("Metadata") or {}),
        results=tuple(_result(result, name, file) for result in model.get("Results") or []),
    )


def _result(result: Any, name: str, file: Path) -> ModelResult:
    if not isinstance(result, dict) or not isinstance(result.get("Metrics"), dict):
        raise _malformed(file, f"a result of {name!r} is {result!r}, expected Task, Dataset, Metrics and Source")
    source = _text(result, "Source", file)
    if source not in SOURCES:
        raise _malformed(file, f"Source of a result of {name!r} is {source!r}, expected {' or '.join(SOURCES)}")
    return ModelResult(
        task=_text(result, "Task", file),
        dataset=_text(result, "Dataset", file),
        metrics=dict(result["Metrics"]),
        source=source,  # type: ignore[arg-type]  # one of SOURCES
        setting=result.get("Setting"),
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]  # comes with MMEngine

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the list of models: {str(file)!r} cannot be read ({error.strerror}), expected a metafile. Install "
            "mmvmamba again."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _malformed(file, f"it is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise _malformed(file, f"its content is {type(content).__name__}, expected a mapping")
    return content


def _list(content: Mapping[str, Any], key: str, file: Path) -> list[Any]:
    value = content.get(key)
    if not isinstance(value, list):
        raise _malformed(file, f"{key} is {type(value).__name__}, expected a list")
    return value


def _text(content: Mapping[str, Any], key: str, file: Path) -> str:
    value = content.get(key)
    if not isinstance(value, str):
        raise _malformed(file, f"{key} is {value!r}, expected a text")
    return value


def _malformed(file: Path, problem: str) -> ConfigError:
    return ConfigError(f"{str(file)!r}: {problem}. Correct the file or install mmvmamba again.")
