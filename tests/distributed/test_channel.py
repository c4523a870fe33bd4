"""Notes of the ranks, which a stranger who reaches the store can neither write nor copy."""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from fedtan_hpc.distributed import channel as channel_module
from fedtan_hpc.distributed import process_group
from fedtan_hpc.distributed.channel import Channel
from fedtan_hpc.distributed.rendezvous import open_store

_c10d: Any = dist


@pytest.fixture
def store() -> Any:
    return _c10d.HashStore()


def test_ranks_of_one_job_read_each_other(store: Any) -> None:
    ours, other = Channel(store, "secret"), Channel(store, "secret")
    ours.write("verdict", "rank 1 hangs")
    assert other.read("verdict") == "rank 1 hangs"
    assert other.wait("verdict", timedelta(seconds=1)) == "rank 1 hangs"
    assert [ours.is_first("given"), other.is_first("given")] == [True, False]


def test_a_text_of_a_stranger_is_not_there(store: Any) -> None:
    """He may know every line of this code, but not the secret."""
    ours = Channel(store, secrets.token_hex())
    for key in ("verdict", "channel/verdict", ours._signed("key", "verdict")):
        store.set(key, "rank 1 hangs")
    Channel(store, "a guess").write("verdict", "rank 1 hangs")
    assert ours.read("verdict") is None
    store.set(ours._signed("key", "verdict"), b"\xff" * 100)
    assert ours.read("verdict") is None


def test_a_copy_of_a_note_is_not_there(store: Any) -> None:
    """Who can read the store sees notes and names, and may write them elsewhere."""
    ours = Channel(store, "secret")
    ours.write("collectives/0", "9")
    ours.write("collectives/1", "8")
    store.set(ours._signed("key", "collectives/1"), store.get(ours._signed("key", "collectives/0")))
    assert ours.read("collectives/1") is None
    later = Channel(store, "secret of the next start")
    assert later.read("collectives/0") is None


def test_nothing_is_obeyed_before_the_secret_is_known(store: Any) -> None:
    mute = Channel(store)
    mute.write("verdict", "rank 1 hangs")
    Channel(store, channel_module.__name__).write("verdict", "rank 1 hangs")
    assert store.num_keys() == 1
    assert mute.read("verdict") is None
    assert not mute.is_first("given")


class LostStore:
    """A store whose server has ended."""

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


def test_the_other_ranks_wait_until_rank_0_has_reported(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_group, "channel", Channel(store, "secret"))
    began = time.monotonic()
    process_group.wait_for_report(0.2)
    assert time.monotonic() - began > 0.15
    process_group.say_reported()
    process_group.wait_for_report(60)
    monkeypatch.setattr(process_group, "channel", Channel(LostStore(), "secret"))
    process_group.wait_for_report(60)
    assert time.monotonic() - began < 10


def test_a_store_on_the_loopback_interface_listens_nowhere_else() -> None:
    server = open_store("127.0.0.1", 0, serves=True)
    client = open_store(server.host, server.port, serves=False)
    client.set("key", "text")
    assert server.get("key") == b"text"
    assert listening_at(server.port) == {"0100007F"}


def listening_at(port: int) -> set[str]:
    """Returns the addresses at which a process of this machine listens, as /proc writes them."""
    found = set()
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}", encoding="ascii") as table:
            for line in table.readlines()[1:]:
                address, number = line.split()[1].split(":")
                if int(number, 16) == port and line.split()[3] == "0A":
                    found.add(address)
    return found
