"""The exceptions mmvmamba raises on purpose.

Every message names the argument or file, what was found, what was expected, and one thing to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MMVMambaError(Exception):
    """Base class of every exception mmvmamba raises on purpose."""


class OpInputError(MMVMambaError, ValueError):
    """An operator was called with an argument it cannot work on."""


class BackendError(MMVMambaError, RuntimeError):
    """A backend was asked for by name and cannot run; the message gives the reason."""


class ConfigError(MMVMambaError, ValueError):
    """A configuration value is unknown, misspelt or contradicts another one."""


class DataError(MMVMambaError, ValueError):
    """A data set is missing or malformed."""


class CheckpointError(MMVMambaError, RuntimeError):
    """A checkpoint cannot be used."""


class CheckpointMismatch(CheckpointError):
    """The entries of a checkpoint are not those of the model."""


def nearest_spelling(name: object, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``choices``, or an empty string.

    Args:
        name: What the user wrote.
        choices: What would have been accepted.
    """
    matches = difflib.get_close_matches(str(name), list(choices), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
