"""How far a tool is, on stderr, so that what it prints stays a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_of(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr inside the ``with`` block, and give what moves it on by one.

    Args:
        what: Named before the bar.
        total: Steps of the whole.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
