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


def check_hidden(layer: str, hidden: int) -> None:
    """Raise ``ConfigError`` unless there is a channel between the two linear maps of a perceptron."""
    if hidden < 1:
        raise ConfigError(
            f"{layer}: hidden is {hidden}, expected at least 1 channel between its linear maps. Raise the ratio of the "
            "perceptron in arch."
        )
