"""Selected layers and rounds: what is synchronised, what it costs, and what decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedtan_hpc
from fedtan_hpc.config.enums import CohortMode, ModelName, PrecisionName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    CohortConfig,
    Config,
    ModelConfig,
    ProbeConfig,
)
from fedtan_hpc.config.validate import check
from fedtan_hpc.evaluation import probe_records
from fedtan_hpc.evaluation.probe_records import ProbeRecord
from fedtan_hpc.probing.deviation import deviations
from fedtan_hpc.probing.mixed_statistics import GLOBAL
from fedtan_hpc.probing.schedule import Schedule
from tests.helpers import jobs
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import distance
from tests.probing import test_deviation, test_probe

LAYERS = ["2", "5"]
"""Of the mlp."""


def config(folder: Path, algorithm: str = "fedtan", **options: Any) -> Config:
    """Five unequal clients, three in a round; names of ``AlgorithmConfig`` go there."""
    names = AlgorithmConfig.__dataclass_fields__
    own = {name: options.pop(name) for name in list(options) if name in names}
    made = test_probe.config(algorithm, folder, None, **{"rounds": 5, **options})
    return replace(made, algorithm=replace(made.algorithm, **own))


def messages(folder: Path) -> list[int]:
    return [line["payload_messages"] for line in jobs.rounds_of(folder)]


@pytest.mark.parametrize("mode", [CohortMode.sequential, CohortMode.auto, CohortMode.stacked])
@pytest.mark.parametrize(("fraction", "same"), [(1.0, "fedtan"), (0.0, "fedavg")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_fractions_one_and_zero_are_the_methods_to_the_bit(
    tmp_path: Path, fraction: float, same: str, mode: CohortMode, ranks: int
) -> None:
    cohort = CohortConfig(mode=mode)
    on_ranks(ranks, jobs.run, config(tmp_path / "method", same, cohort=cohort))
    chosen = config(tmp_path / "chosen", layers="auto", fraction=fraction, cohort=cohort)
    on_ranks(ranks, jobs.run, chosen)
    assert jobs.same_bits(tmp_path / "method", tmp_path / "chosen")
    assert messages(tmp_path / "method") == messages(tmp_path / "chosen")
    assert not (tmp_path / "chosen" / probe_records.NAME).exists()


def test_all_layers_by_name_are_fedtan_to_the_bit(tmp_path: Path) -> None:
    jobs.run(config(tmp_path / "method"))
    jobs.run(config(tmp_path / "chosen", layers=["*"]))
    assert jobs.same_bits(tmp_path / "method", tmp_path / "chosen")


@pytest.mark.parametrize("mode", [CohortMode.sequential, CohortMode.stacked])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_one_layer_is_global_and_the_other_local(ranks: int, mode: CohortMode) -> None:
    """The gradient that training follows, against the written chain rule; and what it costs."""
    options = test_deviation.config("fedtan", cohort=CohortConfig(mode=mode))
    options = replace(options, algorithm=replace(options.algorithm, layers=["5"]))
    records = on_ranks(ranks, test_deviation.probed_record, options)
    own, shared, names = test_deviation.by_hand(options)
    with torch.no_grad():
        own.forward_is_global = [5]
        trained = own.gradients([5])
        reference = shared.gradients(GLOBAL.backward)
    wanted = deviations([trained[name] for name in names], [reference[name] for name in names])
    for record in records:
        got = [*record.deviation["trained"], record.total_deviation["trained"]]
        assert got == pytest.approx([each.relative for each in wanted], abs=1e-9)
        assert sorted(record.deviation) == ["backward", "forward", "trained"]
    assert jobs.known(wanted[-1].relative) > 0.05


def test_messages_are_in_proportion(tmp_path: Path) -> None:
    for name, layers in (("none", []), ("one", ["2"]), ("two", ["2", "5"])):
        options = {"layers": layers} if layers else {"layers": "auto", "fraction": 0.0}
        jobs.run(config(tmp_path / name, rounds=2, **options))
    none, one, two = (messages(tmp_path / name)[0] for name in ("none", "one", "two"))
    assert one - none == 2
    assert two - none == 4


def state_after(options: Config) -> dict[str, Any]:
    jobs.run(options)
    return jobs.state_of(Path(str(options.run_dir)))


@pytest.mark.parametrize("choice", [{"layers": ["5"]}, {"layers": "auto", "choosing_rounds": 2}])
def test_any_number_of_ranks_and_any_way_give_one_result(
    tmp_path: Path, choice: dict[str, Any]
) -> None:
    found = []
    for ranks, mode in ((1, "sequential"), (1, "stacked"), (2, "sequential"), (4, "stacked")):
        options = config(
            tmp_path / f"{ranks}{mode}",
            precision=PrecisionName.float64,
            cohort=CohortConfig(mode=CohortMode(mode)),
            **choice,
        )
        found.append(on_ranks(ranks, state_after, options)[0])
    assert max(distance(each, found[0]) for each in found[1:]) < 1e-10


@pytest.mark.parametrize("layers", [["5"], "auto"])
def test_compiled_steps_are_the_same(tmp_path: Path, layers: Any) -> None:
    """One client on each rank, whose synchronised steps are compiled too."""
    found = []
    for compiled in (False, True):
        options = config(
            tmp_path / str(compiled),
            layers=layers,
            precision=PrecisionName.float64,
            clients=2,
            clients_per_round=2,
            compile=compiled,
        )
        found.append(on_ranks(2, state_after, options, seconds=300)[0])
    assert distance(*found) < 1e-10


def test_the_probe_chooses_after_its_first_rounds(tmp_path: Path) -> None:
    """All layers are synchronised until then; the record says which one differs the most."""
    options = config(tmp_path / "run", layers="auto", fraction=0.5, choosing_rounds=2)
    jobs.run(options)
    records = [*probe_records.read(tmp_path / "run")]
    assert [record.round for record in records] == [1, 2]
    assert [list(record.total_deviation) for record in records] == [["backward", "trained"]] * 2
    sums = {
        name: sum(record.layer_means("kl_divergence")[name] for record in records)
        for name in LAYERS
    }
    schedule = Schedule(options, LAYERS)
    for record in records:
        assert schedule.plan(record.round).layers is None
        schedule.note(record)
    assert schedule.plan(3).layers == frozenset([max(sums, key=sums.__getitem__)])
    counts = messages(tmp_path / "run")
    assert counts[0] == counts[1] == counts[2] + 2 == counts[4] + 2


def test_a_saved_probe_chooses_before_the_first_round(tmp_path: Path) -> None:
    jobs.run(replace(config(tmp_path / "probed"), probe=ProbeConfig(every=5)))
    probed = str(tmp_path / "probed")
    choice: dict[str, Any] = {"layers": "auto", "fraction": 0.5, "probe_run": probed}
    for ranks in (1, 2):
        options = config(tmp_path / f"run{ranks}", **choice)
        on_ranks(ranks, jobs.run, options)
        assert len(set(messages(tmp_path / f"run{ranks}"))) == 1
        assert not (tmp_path / f"run{ranks}" / probe_records.NAME).exists()
    other = config(tmp_path / "other", model=ModelConfig(name=ModelName.cnn), **choice)
    with pytest.raises(ConfigError, match=r"probe_run=.*: allowed is a probe of a network with"):
        jobs.run(other)
    with pytest.raises(ConfigError, match=r"probe_run=.*: allowed is the folder of a run that has"):
        jobs.run(config(tmp_path / "none", **{**choice, "probe_run": str(tmp_path)}))


def test_a_saved_choice_stays_whatever_becomes_of_the_probe(tmp_path: Path) -> None:
    jobs.run(replace(config(tmp_path / "probed"), probe=ProbeConfig(every=5)))
    probed = str(tmp_path / "probed")
    choice: dict[str, Any] = {"layers": "auto", "fraction": 0.5, "probe_run": probed}
    more: dict[str, Any] = {"checkpoint": CheckpointConfig(every=1), **choice}
    jobs.run(config(tmp_path / "whole", **more))
    jobs.run_until(config(tmp_path / "stopped", **more), 2)
    (tmp_path / "probed").rename(tmp_path / "elsewhere")
    jobs.run(config(tmp_path / "stopped", **more))
    assert jobs.same_bits(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_choice_survives_an_interruption(tmp_path: Path, number: int, ranks: int) -> None:
    """Before the choice is made, and after it."""

    def options(name: str) -> Config:
        choice: dict[str, Any] = {"layers": "auto", "fraction": 0.5, "choosing_rounds": 3}
        return config(tmp_path / name, checkpoint=CheckpointConfig(every=1), **choice)

    on_ranks(ranks, jobs.run, options("whole"))
    on_ranks(ranks, jobs.run_until, options("stopped"), number)
    on_ranks(ranks, jobs.run, options("stopped"))
    assert jobs.same_bits(tmp_path / "whole", tmp_path / "stopped")
    assert messages(tmp_path / "whole") == messages(tmp_path / "stopped")


def test_records_that_decide_must_be_there(tmp_path: Path) -> None:
    choice: dict[str, Any] = {"layers": "auto", "fraction": 0.5, "choosing_rounds": 2}
    for more, number in ((choice, 1), ({"synchronise_every": "auto"}, 1)):
        options = config(tmp_path / str(len(more)), **more)
        jobs.run_until(options, 3)
        (Path(str(options.run_dir)) / probe_records.NAME).unlink()
        with pytest.raises(ConfigError, match=f"lacks round {number}, so begin anew"):
            jobs.run(options)


@pytest.mark.parametrize(
    "more",
    [
        {"synchronise_every": "auto", "synchronised_steps": 0},
        {"synchronise_every": "auto", "layers": "auto", "fraction": 0.0},
    ],
)
def test_a_run_without_synchronised_rounds_goes_on(tmp_path: Path, more: dict[str, Any]) -> None:
    options = config(tmp_path / "run", checkpoint=CheckpointConfig(every=1), **more)
    jobs.run_until(options, 2)
    jobs.run(options)
    assert len(jobs.rounds_of(tmp_path / "run")) == 5


def record(number: int, deviation: float | None) -> ProbeRecord:
    return ProbeRecord(round=number, total_deviation={"both": deviation})


def synchronised(schedule: Schedule, found: Sequence[float | None]) -> list[int]:
    """Plays rounds with these deviations; returns the synchronised ones."""
    rounds = []
    for number, deviation in enumerate(found, 1):
        if schedule.plan(number).synchronised_steps:
            assert schedule.causes(number) == ["both"]
            rounds.append(number)
            schedule.note(record(number, deviation))
        else:
            assert schedule.causes(number) == []
    return rounds


def test_rounds_are_due_by_the_deviation(tmp_path: Path) -> None:
    """Gaps double while it is small, up to 64 rounds, and halve while it is large or unknown."""
    options = config(tmp_path, synchronise_every="auto", rounds=500, deviation_limit=0.3)
    steady: list[float | None] = [0.3] * 300
    small = synchronised(Schedule(options, LAYERS), steady)
    assert small == [1, 3, 7, 15, 31, 63, 127, 191, 255]
    mixed: Sequence[float | None] = [0.1] * 10 + [0.9] * 30
    assert synchronised(Schedule(options, LAYERS), mixed)[:6] == [1, 3, 7, 15, 19, 21]
    assert synchronised(Schedule(options, LAYERS), [None, 0.9, 0.9]) == [1, 2, 3]


def test_a_schedule_goes_on_where_it_was(tmp_path: Path) -> None:
    options = config(tmp_path, synchronise_every="auto", rounds=500)
    schedule = Schedule(options, LAYERS)
    synchronised(schedule, [0.1] * 20 + [0.9] * 30)
    other = Schedule(options, LAYERS)
    other.go_on(schedule.probes, 50)
    following = [
        [n for n in range(51, 120) if each.plan(n).synchronised_steps] for each in (schedule, other)
    ]
    assert following[0] == following[1] != []


@pytest.mark.parametrize("every", [None, 2])
def test_adaptive_rounds_of_a_run(tmp_path: Path, every: int | None) -> None:
    """All ranks follow one schedule; a run that was interrupted ends with the same bits."""

    def options(name: str) -> Config:
        made = config(
            tmp_path / name,
            synchronise_every="auto",
            deviation_limit=100.0,
            rounds=9,
            checkpoint=CheckpointConfig(every=1),
        )
        return replace(made, probe=ProbeConfig(every=every))

    on_ranks(2, jobs.run, options("whole"))
    counts = messages(tmp_path / "whole")
    assert [n for n, count in enumerate(counts, 1) if count > min(counts)] == [1, 3, 7]
    probed = {each.round: each for each in probe_records.read(tmp_path / "whole")}
    assert sorted(probed) == sorted({1, 3, 7} | set(range(2, 10, 2) if every else []))
    assert [*probed[7].total_deviation] == ["both", "trained"]
    on_ranks(2, jobs.run_until, options("stopped"), 4)
    on_ranks(2, jobs.run, options("stopped"))
    assert jobs.same_bits(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"layers": "bn1"}, r"algorithm\.layers=bn1: .*; try algorithm\.layers=\[bn1\]"),
        ({"layers": []}, r"algorithm\.layers=\[\]: allowed is all, auto, or a list"),
        ({"layers": [3.5]}, r"algorithm\.layers=\[3\.5\]: "),
        ({"fraction": 0.5}, r"fraction=0\.5: allowed is null unless algorithm\.layers=auto"),
        ({"layers": "auto", "fraction": 1.5}, r"fraction=1\.5: allowed is a number >= 0"),
        ({"layers": "auto", "choosing_rounds": 0}, r"choosing_rounds=0: allowed is a whole"),
        ({"layers": "auto", "rounds": 3}, r"choosing_rounds=3: allowed is fewer than rounds, 3"),
        ({"layers": ["2"], "probe_run": "x"}, r"probe_run=x: allowed is null unless"),
        ({"layers": "auto", "probe_run": " "}, r"probe_run= : allowed is the folder"),
        ({"layers": "auto", "probe_run": "x", "choosing_rounds": 1}, "leave one of both out"),
        ({"synchronise_every": "often"}, r"synchronise_every=often: allowed is a whole number"),
        ({"synchronise_every": 1.5}, r"synchronise_every=1\.5: allowed is a whole number"),
        ({"synchronise_every": 0}, r"synchronise_every=0: allowed is a whole number"),
        ({"deviation_limit": 0.1}, r"deviation_limit=0\.1: allowed is null unless"),
        ({"synchronise_every": "auto", "deviation_limit": 0.0}, "deviation_limit=0"),
        ({"algorithm": "fedavg", "layers": ["2"]}, r"algorithm\.layers=.*allowed is null with"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        check(config(tmp_path, **options))
    assert len(caught.value.mistakes) == 1


def test_a_name_that_matches_no_bn_layer(tmp_path: Path) -> None:
    """It is found before data are loaded and a folder is made."""
    with pytest.raises(ConfigError, match=r"layers=1: .*it matches none; the first are 2, 5"):
        jobs.run(config(tmp_path / "run", layers=["2", 1]))
    assert not (tmp_path / "run").exists()


def test_in_a_loop_of_ones_own() -> None:
    """Only the named layers are global, and other names are refused."""
    model = fedtan_hpc.convert_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    with (
        pytest.raises(ValueError, match="layers has '1', which is no BN layer"),
        fedtan_hpc.federated_statistics(model, 1.0, layers=["1"]),
    ):
        pass
    assert on_ranks(2, global_means) == [[False, True]] * 2


def global_means() -> list[bool]:
    rank = torch.distributed.get_rank()
    layers = [torch.nn.BatchNorm1d(2, momentum=1.0) for _ in range(2)]
    model = fedtan_hpc.convert_batchnorm(torch.nn.Sequential(*layers))
    first, second = model.children()
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(rank)) + 5 * rank
    with fedtan_hpc.federated_statistics(model, 0.5, layers=["1"]):
        second(first(x) + 5 * rank)
    means = [each.get_buffer("running_mean") for each in (first, second)]
    gathered: list[Any] = [None, None]
    torch.distributed.all_gather_object(gathered, means)
    return [torch.allclose(a, b) for a, b in zip(*gathered, strict=True)]
