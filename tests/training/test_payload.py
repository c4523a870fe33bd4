"""The messages and bytes of a round by method."""

from __future__ import annotations

from fedtan_hpc.config.schema import Config
from fedtan_hpc.distributed import process_group
from fedtan_hpc.job.setup import prepare
from tests.helpers.methods import config
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU


def messages(options: Config) -> list[tuple[int, int]]:
    records = prepare(options, CPU).train([])
    sent = [(record.comm_messages, record.comm_bytes) for record in records]
    payload = [(record.payload_messages, record.payload_bytes) for record in records]
    assert sent == (payload if process_group.is_started() else [(0, 0)] * len(records))
    return payload


def test_messages_of_the_methods() -> None:
    """Two BN layers with three exchanges each in float64; three steps.

    The mlp has 17,610 trainable values and 384 running statistics.
    """
    trainable, running, header = 17_610, 384 + 2, 4
    sizes = {
        "fedavg": (1, trainable + running + header),
        "fedavg_gn": (1, trainable + header),
        "fedbn": (1, trainable - 384 + header),
        "silobn": (1, trainable + header),
        "singleset": (0, 0),
        "hbn": (1, trainable + running + header),
    }
    for method, (count, floats) in sizes.items():
        options = config(method, rounds=1, clients_per_round=None)
        for [(number, payload)] in on_ranks(2, messages, options):
            assert (number, payload) == (count, 8 * floats), method
        assert messages(options) == [(count, 8 * floats)]
    [frozen, *_] = on_ranks(2, messages, config("fixbn", rounds=2, clients_per_round=None))
    assert frozen == [(1, 8 * (trainable + running + header)), (1, 8 * (trainable + header))]
    [centralised, *_] = on_ranks(2, messages, config("centralised", rounds=1))
    assert centralised[0][0] == 3 * (6 + 1) + 1
    assert process_group.world_size() == 1


def payloads(options: Config) -> list[tuple[int, int]]:
    records = prepare(options, CPU).train([])
    return [(record.payload_bytes, record.comm_bytes) for record in records]


def test_moving_states_are_no_payload() -> None:
    """fedbn has the same payload on one and two ranks; states that move are sent beside it."""
    options = config("fedbn", rounds=5, clients=6)
    alone = messages(options)
    records = on_ranks(2, payloads, options)
    assert [payload for payload, _ in records[0]] == [payload for _, payload in alone]
    assert any(sent > payload for payload, sent in records[0])
