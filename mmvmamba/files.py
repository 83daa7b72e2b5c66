"""What is there, asked without an error: names that no file can have and folders that may not be read have nothing.

``pathlib`` raises OSError for a name that is too long or lies in a closed folder, ``os.path`` does not.
"""

from __future__ import annotations

import os


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or folder."""
    return os.path.exists(path)  # noqa: PTH110 - see above


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file."""
    return os.path.isfile(path)  # noqa: PTH113 - see above


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder."""
    return os.path.isdir(path)  # noqa: PTH112 - see above
