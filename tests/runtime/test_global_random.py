"""Seeding, keeping and restoring the global generators of torch, Python and numpy."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import fedtan_hpc
from fedtan_hpc.config.enums import ModelSource
from fedtan_hpc.config.schema import Config, ModelConfig
from fedtan_hpc.runtime import global_random
from fedtan_hpc.runtime.global_random import GlobalStates

Draws = tuple[float, float, float, float]


def draws() -> Draws:
    """One number of each kind; numpy and Python keep every second normal number for later."""
    return (
        float(torch.rand(())),
        random.gauss(0, 1),
        float(np.random.randn()),
        float(np.random.rand()),
    )


def test_seeds_decide_what_is_drawn() -> None:
    with global_random.preserved():
        global_random.seed(2**63 - 1)
        first = draws(), draws()
        global_random.seed(7)
        other = draws()
        global_random.seed(2**63 - 1)
        assert (draws(), draws()) == first
    assert all(a != b for a, b in zip(first[0], other, strict=True))


@pytest.mark.parametrize("before", [0, 1, 2])
def test_two_sequences_take_turns(before: int) -> None:
    """Each goes on where it was, whether it had drawn nothing, one number or two."""

    def begin(number: int) -> GlobalStates:
        global_random.seed(number)
        for _ in range(before):
            draws()
        return GlobalStates.get()

    with global_random.preserved():
        expected = {}
        for number in (1, 2):
            begin(number)
            expected[number] = [draws() for _ in range(3)]
        states = {number: begin(number) for number in (1, 2)}
        for step in range(3):
            for number in (1, 2):
                states[number].set()
                assert draws() == expected[number][step]
                states[number] = GlobalStates.get()


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_the_caller_gets_its_states_back(kind: type[np.random.BitGenerator]) -> None:
    theirs = np.random.mtrand.get_bit_generator()
    np.random.mtrand.set_bit_generator(kind(3))
    try:
        draws()
        states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
        with global_random.preserved():
            global_random.seed(6)
            draws()
        assert random.getstate() == states[0]
        assert str(np.random.get_state(legacy=False)) == str(states[1])
        assert torch.equal(torch.get_rng_state(), states[2])
    finally:
        np.random.mtrand.set_bit_generator(theirs)


def test_a_run_leaves_the_callers_states_alone(tmp_path: Path) -> None:
    target = ModelConfig(source=ModelSource.import_, target="tests.helpers.networks:drawing")
    run = fedtan_hpc.run  # imports torch's parts, some of which draw numbers
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = draws()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    config = Config(model=target, rounds=1, local_steps=2, run_dir=str(tmp_path / "run"))
    run(config, callbacks=[])
    assert draws() == expected
