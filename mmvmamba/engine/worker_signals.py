"""DataLoader workers that outlive a signal meant for the training.

Ctrl-C reaches every process of the terminal's group, and Slurm signals every process of a job step. A worker that dies
of it makes PyTorch raise an error in the main process, in the middle of an iteration and before a checkpoint is
written. So workers leave these signals to the main process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

#: Seconds, as in PyTorch's own loops.
_LOOK_EVERY = 5.0
_LEFT_TO_THE_MAIN_PROCESS = frozenset({signal.SIGINT, signal.SIGUSR1, signal.SIGTERM})


class WorkerShield:
    """Let the workers that the given DataLoaders start from now on ignore SIGINT, SIGUSR1 and most SIGTERM.

    PyTorch and Python's multiprocessing end a worker that does not end by itself by SIGTERM; that one, since it comes
    from the main process, is obeyed. A worker whose main process is gone ends within five seconds, even where it waits
    for somebody to take its batch, in which PyTorch's workers stay for ever.

    Programs that a data set starts in a worker inherit that SIGTERM is blocked: they must be ended by ``kill()``.

    Args:
        loaders: DataLoaders; workers that run already are not reached.
    """

    def __init__(self, loaders: Iterable[DataLoader[Any]]) -> None:
        self._loaders = list(loaders)
        for loader in self._loaders:
            loader.worker_init_fn = _ShieldedStart(loader.worker_init_fn, os.getpid())
            # A worker calls that only after some work of its own, and dies of a signal that comes before: its process
            # begins with these signals blocked. PyTorch has no public place around the start of the workers alone.
            loader._get_iterator = _BlockedStart(loader._get_iterator)  # type: ignore[method-assign]

    def lift(self) -> None:
        """Let workers to come start as before."""
        for loader in self._loaders:
            if isinstance(loader.worker_init_fn, _ShieldedStart):
                loader.worker_init_fn = loader.worker_init_fn.inner
            if isinstance(loader._get_iterator, _BlockedStart):
                del loader._get_iterator  # the class has its own again
        self._loaders = []


class _BlockedStart:
    """Starts the workers of a DataLoader while signals are kept back; the main process gets them right after."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start

    def __call__(self) -> Any:
        with _kept_back():
            return self._start()


@contextmanager
def _kept_back() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_MAIN_PROCESS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _ShieldedStart:
    """What a worker calls first, in place of the DataLoader's own ``worker_init_fn``; a class, to be pickled."""

    def __init__(self, inner: Callable[[int], None] | None, parent: int) -> None:
        self.inner = inner
        self._parent = parent

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # What has come since the process began is gone with that: ignored.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGUSR1})
        # A handler of Python's does not learn who has sent a signal; a thread that waits for it does. Blocked first, in
        # this thread and so in all that it starts, the signal reaches nobody else.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=self._obey_the_parent, name="sigterm", daemon=True).start()
        if self.inner is not None:
            self.inner(worker)

    def _obey_the_parent(self) -> None:
        began_under = os.getppid()  # the main process, or the server that forks in its place
        while os.getppid() == began_under and _main_process_lives():
            received = signal.sigtimedwait({signal.SIGTERM}, _LOOK_EVERY)
            if received is not None and received.si_pid == self._parent:
                os._exit(0)  # as PyTorch's own handler does for a SIGTERM of the main process
        os._exit(1)


def _main_process_lives() -> bool:
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()


def loaders_of(loops: Iterable[Any]) -> list[DataLoader[Any]]:
    """Return the DataLoaders of MMEngine loops, with those that another one keeps to do its work."""
    found: list[DataLoader[Any]] = []
    for loop in loops:
        loader = getattr(loop, "dataloader", None)
        if isinstance(loader, DataLoader):
            found.append(loader)
            found += [inner for inner in vars(loader).values() if isinstance(inner, DataLoader)]
    return found
