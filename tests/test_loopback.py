"""The rendezvous of one node on 127.0.0.1."""

from __future__ import annotations

import socket

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters

from mmvmamba.errors import ConfigError
from mmvmamba.loopback import ADDRESS, LoopbackRendezvous, create_handler, loopback_store, main


def _free_port():
    with socket.socket() as free:
        free.bind((ADDRESS, 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("chosen", [False, True])
def test_each_start_meets_in_an_empty_store(chosen):
    """In the store of the start before, a quick process would find addresses that nobody listens on any more."""
    port = _free_port() if chosen else 0
    handler = LoopbackRendezvous("run", port)
    for _ in range(3):
        info = handler.next_rendezvous()
        place = info.bootstrap_store_info
        assert (info.rank, info.world_size, place.master_addr) == (0, 1, ADDRESS)
        assert not chosen or place.master_port == port
        process = TCPStore(ADDRESS, place.master_port)
        assert not process.check(["address"]) and not info.store.check(["role"])
        process.set("address", "gone soon")
        info.store.set("role", "default")
        del process


def test_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind((ADDRESS, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^port {port} of 127\.0\.0\.1 cannot be used \(Address"):
            loopback_store(port)


@pytest.mark.parametrize(
    ("endpoint", "nodes", "message"),
    [("127.0.0.1:0", 2, "--nnodes is 2, expected 1"), ("10.0.0.1:0", 1, "--rdzv-endpoint is '10.0.0.1:0', expected")],
)
def test_what_is_not_on_this_machine_is_refused(endpoint, nodes, message):
    with pytest.raises(ConfigError, match=message):
        create_handler(RendezvousParameters("loopback", endpoint, "run", nodes, nodes))


def test_a_launcher_whose_port_is_taken_says_so_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind((ADDRESS, 0))
        taken.listen()
        endpoint = f"{ADDRESS}:{taken.getsockname()[1]}"
        with pytest.raises(SystemExit, match=r"^error: port \d+ of 127\.0\.0\.1 cannot be used"):
            main(["--nproc-per-node=1", "--rdzv-endpoint", endpoint, "--log-dir", str(tmp_path), "nothing.py"])
