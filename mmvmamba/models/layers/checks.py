"""Checks of constructor arguments that several layers make."""

from __future__ import annotations

from mmvmamba.errors import ConfigError, nearest_spelling


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ConfigError`` naming ``argument`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(
            f"{argument} is {value!r}, expected one of {', '.join(map(repr, choices))}."
            f"{nearest_spelling(value, choices)} Write one of these names."
        )
