"""docs/methods.md describes every algorithm as the rows of ``algorithms.ALGORITHMS`` define it.

Each cell of the page's table is looked up by the fields of the row and by the plans that ``plan``
makes of it, so that another row, or another meaning of it, asks for another sentence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from fedtan_hpc.config.algorithms import ALGORITHMS, Algorithm, Normaliser, ParameterGroup, plan
from fedtan_hpc.config.enums import AlgorithmName, NormName
from fedtan_hpc.config.schema import AlgorithmConfig, Config
from tests.helpers.commands import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")

Groups = frozenset[ParameterGroup]
ALL: Groups = frozenset(ParameterGroup)
NOTHING: Groups = frozenset()
STATISTICS: Groups = frozenset({ParameterGroup.statistics})
LAYERS = STATISTICS | {ParameterGroup.affine}
MIXING: Groups = frozenset({ParameterGroup.mixing})

AVERAGED = {
    (False, ALL, ALL): "Everything, after the round.",
    (False, ALL - LAYERS, ALL - LAYERS): "Everything but BN layers, after the round.",
    (False, ALL - STATISTICS, ALL - STATISTICS): "Everything but statistics, after the round.",
    (False, ALL - MIXING, ALL - MIXING): "Everything but d, after the round.",
    (False, NOTHING, NOTHING): "Nothing.",
    (False, ALL, ALL - STATISTICS): (
        "Everything, after the round; from round `algorithm.switch_round` on everything but "
        "statistics, which no longer change."
    ),
    (True, ALL, ALL): "The gradients, in every step; everything, after the round.",
}
"""By whether gradients are pooled, and what the first and the last round average."""

STEPS = 7
"""Local steps of a round (E)."""
BATCH, FROZEN, RUNNING = Normaliser.batch, Normaliser.frozen, Normaliser.running
TRAINING = {
    (NormName.bn, 1, BATCH, BATCH, False): (
        "The batches of all clients in the first step of a round, and the gradient passes through "
        "their statistics; the client's batch in the other steps."
    ),
    (NormName.bn, 0, BATCH, BATCH, False): "The client's batch.",
    (NormName.gn, 0, BATCH, BATCH, False): (
        "Each sample by itself, in `algorithm.groups` groups of channels (BN becomes group "
        "normalization)."
    ),
    (NormName.ln, 0, BATCH, BATCH, False): (
        "Each sample by itself, over all channels (BN becomes layer normalization)."
    ),
    (NormName.bn, 0, BATCH, FROZEN, False): (
        "The client's batch; from round `algorithm.switch_round` on the averaged running "
        "statistics."
    ),
    (NormName.bn, 0, RUNNING, RUNNING, False): (
        "The running statistics of the round's start, and no gradient passes through them."
    ),
    (NormName.bn, 0, RUNNING, RUNNING, True): (
        "For each channel a learnt mix of the running statistics of the round's start and the "
        "statistics of the client's batch."
    ),
    (NormName.bn, STEPS, BATCH, BATCH, False): (
        "The batches of all clients in every step, and the gradient passes through their "
        "statistics."
    ),
}
"""By norm, synchronised local steps, the first and the last round's normaliser, and mixing."""

TEST = {
    (NormName.bn, False): "The averaged running statistics.",
    (NormName.bn, True): "The client's running statistics.",
    (NormName.gn, False): "Each sample by itself, as in training.",
    (NormName.ln, False): "Each sample by itself, as in training.",
}
"""By norm, and whether clients keep the statistics."""

KEPT = {
    NOTHING: "Nothing.",
    LAYERS: "Its BN layers: gamma, beta and statistics.",
    STATISTICS: "The statistics of its BN layers.",
    MIXING: "d, the number of each channel that sets the mix.",
    ALL: "Its whole model.",
}


@dataclass(frozen=True)
class Described:
    """What the page says of an algorithm: four cells, and whether ``model.norm`` may choose."""

    cells: tuple[str, ...]
    any_norm: bool


def by_the_code(name: AlgorithmName) -> Described:
    """Raises ``KeyError`` for a kind of algorithm for which this file has no sentence yet."""
    row = ALGORITHMS[name]
    config = Config(algorithm=AlgorithmConfig(name=name), rounds=100, local_steps=STEPS)
    first, last = plan(config, 1), plan(config, config.rounds)
    normalisers = first.normaliser, last.normaliser
    training = row.norm, first.synchronised_steps, *normalisers, row.mixes
    cells = (
        AVERAGED[first.pooled_gradients, first.averaged, last.averaged],
        TRAINING[training],
        TEST[row.norm, ParameterGroup.statistics in row.private],
        KEPT[row.private],
    )
    return Described(cells, row.any_norm)


def rows() -> list[list[str]]:
    section = PAGE.split("\n## The eleven algorithms\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (`.*) \|$", section, flags=re.MULTILINE)
    header, *cells = [line.split(" | ") for line in lines]
    assert header[0] == "`algorithm=`"
    return cells


def by_the_page() -> dict[str, Described]:
    sentence = PAGE.split("**Other normalization layers**")[1].split("\n- ")[0]
    any_norm = set(re.findall(r"`(\w+)`", sentence)) & {str(name) for name in AlgorithmName}
    described = {}
    for cell, *cells in rows():
        name = cell.strip("`")
        described[name] = Described(tuple(cells), name in any_norm)
    return described


def test_every_algorithm_has_one_row() -> None:
    assert sorted(name for name, *_ in rows()) == sorted(f"`{name}`" for name in AlgorithmName)


@pytest.mark.parametrize("name", AlgorithmName, ids=str)
def test_the_page_says_what_the_code_does(name: AlgorithmName) -> None:
    assert by_the_page()[name] == by_the_code(name)


VALUES: dict[str, list[Any]] = {
    "norm": list(NormName),
    "any_norm": [False, True],
    "synchronised_steps": [0, 1, 2, None],
    "normaliser": list(Normaliser),
    "later_normaliser": [None, *Normaliser],
    "mixes": [False, True],
    "pooled_gradients": [False, True],
    "private": [NOTHING, LAYERS, STATISTICS, MIXING, ALL],
}


@pytest.mark.parametrize("name", AlgorithmName, ids=str)
def test_another_row_asks_for_other_words(
    name: AlgorithmName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes each field to each other value; the comparison above fails for all of them."""
    assert list(VALUES) == [field.name for field in fields(Algorithm)]
    row, said = ALGORITHMS[name], by_the_page()[name]
    for field, values in VALUES.items():
        for value in values:
            if value == getattr(row, field) or (field, value) == (
                "later_normaliser",
                row.normaliser,
            ):
                continue  # a later normaliser like the first changes nothing
            monkeypatch.setitem(ALGORITHMS, name, replace(row, **{field: value}))
            try:
                assert by_the_code(name) != said, (field, value)
            except KeyError:
                continue
