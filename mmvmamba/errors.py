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


class MissingPackage(MMVMambaError, ImportError):
    """Something was asked for that needs a package which is not installed; the message has the pip command."""


class OutputError(MMVMambaError, OSError):
    """A result cannot be written where it should go."""


class DataError(MMVMambaError, ValueError):
    """A data set is missing or malformed."""


class CheckpointError(MMVMambaError, RuntimeError):
    """A checkpoint cannot be used."""


class CheckpointMismatch(CheckpointError):
    """The entries of a checkpoint are not those of the model."""


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint could run code of its author, or is of a kind that can; nothing of it was run."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint is cut off, damaged or no checkpoint at all."""


class HashMismatch(CheckpointError):
    """A file is not the one that its manifest or the caller describes."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; the earlier ones are as they were."""


class NonFiniteLossError(MMVMambaError, FloatingPointError):
    """A loss or a gradient is NaN or infinite; the weights are those of the last good step."""


class OutOfMemory(MMVMambaError, RuntimeError):
    """A training did not find enough memory; the checkpoints are as they were."""


class WorkerError(MMVMambaError, RuntimeError):
    """A DataLoader worker died or gave no batch in time; the checkpoints are as they were."""


class TrainingInterrupted(MMVMambaError):
    """A signal ended the training after a checkpoint was written.

    Attributes:
        signal_number: The signal; a command line ends with 128 plus this number, as a shell would report it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def nearest_spelling(name: object, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``choices``, or an empty string.

    Args:
        name: What the user wrote.
        choices: What would have been accepted.
    """
    matches = difflib.get_close_matches(str(name), list(choices), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
