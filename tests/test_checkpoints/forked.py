"""Running a piece of code in a child process, so that whatever it does to the process is seen and does not stay."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable


def forked(action: Callable[[], object]) -> tuple[str, str]:
    """Return what an action in a child process ended with: the names of the exception's classes, and its message.

    An action that returns gives ``("", str(result))``, one that dies ``("died", status)``.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking a process with threads: the child starts none
        child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = ("", str(action()))
        except BaseException as error:  # noqa: BLE001 (the report is about whatever happened)
            answer = (" ".join(kind.__name__ for kind in type(error).__mro__), f"{error}\n{traceback.format_exc()}")
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return tuple(json.loads(text)) if text and status == 0 else ("died", str(status))
