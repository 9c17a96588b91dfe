"""Where ranks meet: a file on one machine, a store of rank 0 between machines."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from torch import distributed as dist

from learner.ranks import rendezvous
from learner.ranks.distributed import Ranks
from learner.ranks.rendezvous import interface_towards, open_rendezvous
from tests.learner.ranks.test_distributed import run_ranks


def test_on_one_machine_nothing_listens():
    before = {one.laddr for one in psutil.Process().net_connections()}
    address, served = open_rendezvous("127.0.0.1")
    directory = Path(address.removeprefix("file://")).parent
    assert directory.is_dir()
    assert served is None
    assert {one.laddr for one in psutil.Process().net_connections()} == before
    directory.rmdir()


@pytest.fixture
def served(monkeypatch):
    """A rendezvous as between machines, on loopback."""
    monkeypatch.setattr(rendezvous, "_is_this_machine", lambda host: False)
    return open_rendezvous("127.0.0.1")


def test_the_port_is_taken_from_the_moment_it_is_chosen(served):
    url = urlsplit(served[0])
    assert url.hostname == "127.0.0.1"
    with pytest.raises(OSError, match="in use"):
        socket.create_server((url.hostname, url.port))
    listening = [one.laddr for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == url.port] == ["127.0.0.1"]  # on no other interface


def meet(rank, ready, directory):
    """Rank 0 opens the rendezvous; both join, sum a number, and write it down."""
    rendezvous._is_this_machine = lambda host: False
    written, own = directory / "address", None
    if rank == 0:
        address, own = open_rendezvous("127.0.0.1")
        written.write_text(address)
    ready.wait()
    ranks = Ranks.join(*(rank, 2, written.read_text()), served=own, device=torch.device("cpu"), timeout_s=30)
    total = ranks.sum(torch.tensor([rank + 1.0])).item()
    (directory / f"rank-{rank}").write_text(f"{total} {os.environ['GLOO_SOCKET_IFNAME']}")
    dist.destroy_process_group()


def test_two_ranks_meet_at_the_store_of_the_first(tmp_path):
    run_ranks(meet, tmp_path)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["3.0 lo", "3.0 lo"]


def test_the_interface_is_the_one_that_leads_to_the_other_machine(monkeypatch):
    assert interface_towards("127.0.0.1") == "lo"
    found = {"lo": [SimpleNamespace(address="127.0.1.1")], "eth7": [SimpleNamespace(address="127.0.0.1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    assert interface_towards("127.0.0.1") == "eth7"
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    assert interface_towards("127.0.0.1") is None
