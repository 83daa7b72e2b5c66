"""``python -m mmvmamba.loopback``: torchrun whose processes meet on 127.0.0.1 and are reached from nowhere else.

torch.distributed has no authentication: who reaches its port can run code in the training. ``torchrun --standalone``
listens on all addresses of the machine, as every ``TCPStore`` does that opens its port itself. Here the port is opened
on the loopback address first and handed to the store. The command line is that of ``python -m torch.distributed.run``,
for one node; ``--rdzv-endpoint`` may name a port (default: a free one).
"""

from __future__ import annotations

import signal
import socket
import sys
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # exported, but not by name
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from mmvmamba.errors import ConfigError

ADDRESS = "127.0.0.1"
BACKEND = "loopback"


def loopback_store(port: int = 0, timeout: timedelta = timedelta(minutes=5)) -> TCPStore:
    """Return a store that listens on the loopback address alone.

    Args:
        port: Where; 0 takes a free one, which the store's ``port`` tells.
        timeout: How long its operations wait.

    Raises:
        ConfigError: If the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port {port} of {ADDRESS} cannot be used ({error.strerror}), expected a free one. Set PORT to another, or "
            "leave it out where one is chosen."
        ) from error
    listener.listen(1024)
    return TCPStore(
        ADDRESS,
        listener.getsockname()[1],
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )


class LoopbackRendezvous(RendezvousHandler):
    """The meeting of one node with itself.

    The processes of each start meet in a store of their own: in that of a start before, they would find, if they are
    quick, the addresses of processes that are gone. (So it is with the rendezvous "c10d" of PyTorch 2.11.)

    Args:
        run_id: Name of the run, the beginning of the agent's own keys.
        port: Where the processes meet; 0 takes a free one at each start.
    """

    def __init__(self, run_id: str, port: int = 0) -> None:
        self._run_id = run_id
        self._port = port
        self._of_agent = loopback_store()
        self._of_processes: TCPStore | None = None
        self._round = 0

    def get_backend(self) -> str:
        """Return the name under which ``--rdzv-backend`` finds it."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """The processes meet in a store of the agent: none opens a port of its own for that."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the node as number 0 of 1.

        Raises:
            ConfigError: If the port that was asked for is taken.
        """
        self._round += 1
        self._of_processes = None  # closes its port, which may be the one that is opened next
        self._of_processes = loopback_store(self._port)
        store = PrefixStore(f"{self._run_id}/{self._round}", self._of_agent)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, self._of_processes.port))

    def is_closed(self) -> bool:
        """No other node could close it."""
        return False

    def set_closed(self) -> None:
        """Do nothing: no other node would learn of it."""

    def num_nodes_waiting(self) -> int:
        """No other node can come."""
        return 0

    def get_run_id(self) -> str:
        """Return the name of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """There is nothing to end: the stores end with the process."""
        return True


def create_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """Return the rendezvous that a command line asks for.

    Raises:
        ConfigError: If it is for several nodes or for another address.
    """
    if parameters.max_nodes != 1:
        raise ConfigError(
            f"--nnodes is {parameters.max_nodes}, expected 1: other nodes do not reach {ADDRESS}. Use python -m "
            "torch.distributed.run with an address of a private network."
        )
    host, port = parse_rendezvous_endpoint(parameters.endpoint or ADDRESS, 0)
    if host not in (ADDRESS, "localhost"):
        raise ConfigError(
            f"--rdzv-endpoint is {parameters.endpoint!r}, expected {ADDRESS} with or without a port. Correct it."
        )
    return LoopbackRendezvous(parameters.run_id, port)


def main(arguments: list[str] | None = None) -> None:
    """Run torchrun on the loopback address and end as a shell expects: 1 with one line after an error of ours.

    After a signal the exit code is 128 plus its number.
    """
    from torch.distributed import run

    rendezvous_handler_registry.register(BACKEND, create_handler)
    try:
        run.main([f"--rdzv-backend={BACKEND}", *(sys.argv[1:] if arguments is None else arguments)])
    except SignalException as stop:
        # The processes got it, too, and had 30 seconds for it.
        sys.stderr.write(f"interrupted: {signal.Signals(stop.sigval).name} has ended the launcher and its processes\n")
        sys.exit(128 + stop.sigval)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
