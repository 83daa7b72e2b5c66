"""Refusing overrides of a config's top-level names that nothing reads any more.

``data_root = "data/coco/"`` at the top of a config is a variable of the file: MMEngine has put its value into
``train_dataloader`` and elsewhere by the time an override is applied, which then changes a name that nobody asks for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from mmengine.runner import FlexibleRunner, Runner

from mmvmamba.errors import ConfigError, nearest_spelling

#: What is read besides the arguments of the runners: by the code of MMEngine's runners, and by our tools.
_ALSO_READ = (
    *("activation_checkpointing", "compile", "efficient_conv_bn_eval", "find_unused_parameters", "model_wrapper_cfg"),
    *("init_weights_for_test_or_val", "runner_type", "sync_bn", "tta_model", "tta_pipeline"),
)
_NAMED = 3


@cache
def read_names() -> frozenset[str]:
    """Return the top-level names of a config that MMEngine's runners or our tools read."""
    arguments = {name for runner in (Runner, FlexibleRunner) for name in inspect.signature(runner).parameters}
    return frozenset((arguments - {"self", "cfg"}) | set(_ALSO_READ))


def check_overrides(path: str, cfg: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise for overrides without an effect.

    Args:
        path: The config file, for the message.
        cfg: What was read from it.
        keys: The dotted names that are to be overridden.

    Raises:
        ConfigError: If the first part of one is no entry that a runner or a tool reads.
    """
    known = read_names()
    for key in keys:
        name = key.partition(".")[0]
        if name in known:
            continue
        if name not in cfg:
            raise ConfigError(
                f"{path}: --cfg-options has {key!r}, expected an entry that is read: there is no {name!r} in the file, "
                f"and no tool asks for one.{nearest_spelling(name, known)} Correct or drop it."
            )
        places = sorted(
            (place for entry in known & cfg.keys() for place in _places(cfg[entry], name, entry)), key=_rank
        )
        more = " ..." if len(places) > _NAMED else ""
        instead = f" ({', '.join(places[:_NAMED])}{more})" if places else ""
        raise ConfigError(
            f"{path}: --cfg-options has {key!r}, which would have no effect: {name!r} is a variable of the file, and "
            f"was already used when the file was read. Change it in the file (a copy), or override the entries that "
            f"were made from it{instead}."
        )


def _places(value: Any, name: str, place: str) -> Iterator[str]:
    """Yield the dotted names below an entry that end with this name."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        if key == name:
            yield f"{place}.{key}"
        yield from _places(part, name, f"{place}.{key}")


def _rank(place: str) -> tuple[bool, bool, str]:
    """Sort training before validation and test."""
    return not place.startswith("train"), not place.startswith("val"), place
