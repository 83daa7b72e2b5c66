"""What an ``arch`` may be: the name of a variant, or its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mmvmamba.errors import ConfigError, nearest_spelling
from mmvmamba.models.layers.checks import check_choice

Arch = TypeVar("Arch")


def resolve_arch(arch: str | Mapping[str, Any] | Arch, archs: Mapping[str, Arch], kind: type[Arch]) -> Arch:
    """Return the options behind ``arch``.

    Args:
        arch: A key of ``archs``, a dict with the fields of ``kind``, or a ``kind``.
        archs: The variants of the family by name.
        kind: The frozen dataclass of the family's options. Fields of a dict that are sequences become tuples.

    Raises:
        ConfigError: If the name or a key is unknown (with the nearest spelling), or a field without default missing.
    """
    if isinstance(arch, kind):
        return arch
    if isinstance(arch, str):
        check_choice("arch", arch, tuple(archs))
        return archs[arch]
    if not isinstance(arch, Mapping):
        raise ConfigError(
            f"arch is {arch!r}, expected one of {', '.join(archs)} or a dict with the fields of {kind.__name__}. "
            "Write one of these."
        )
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # a dataclass, which no annotation can say
    names = [field.name for field in fields]
    for key in arch:
        if key not in names:
            raise ConfigError(
                f"arch: unknown key {key!r}, expected keys among {', '.join(names)}.{nearest_spelling(key, names)} "
                "Remove or rename it."
            )
    needed = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in arch]
    if missing:
        raise ConfigError(f"arch: {', '.join(missing)} missing, found {sorted(arch)}. Add one value per stage.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in arch.items()})


def check_stages(**per_stage: Sequence[int]) -> None:
    """Raise ``ConfigError`` unless all of these are positive integers, one per stage, of one number of stages."""
    for name, value in per_stage.items():
        sequence = isinstance(value, Sequence) and len(value) > 0
        if not sequence or not all(isinstance(n, int) and n > 0 for n in value):
            raise ConfigError(f"arch: {name} is {value!r}, expected positive integers, one per stage. Correct it.")
    (first, stages), *others = per_stage.items()
    for name, value in others:
        if len(value) != len(stages):
            raise ConfigError(
                f"arch: {first} {stages} name {len(stages)} stages but {name} {value} name {len(value)}, expected "
                "equal lengths. Correct one of them."
            )
