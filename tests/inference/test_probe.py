"""A probe of a saved model measures what a probe of the next round would have measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedtan_hpc.config.enums import NormName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import ModelConfig, ProbeConfig
from fedtan_hpc.evaluation import probe_records
from fedtan_hpc.evaluation.probe_records import ProbeRecord
from fedtan_hpc.files.reading import FileError
from fedtan_hpc.inference import probe, saved_run
from fedtan_hpc.inference.saved_run import SavedRun
from tests.helpers import jobs
from tests.helpers.ranks import on_ranks

CAUSES = ("forward", "backward", "both")


def finished(folder: Path, algorithm: str, rounds: int = 3, **more: Any) -> SavedRun:
    """Three of four unequal clients in a round, each with one probe in the last round."""
    options = {"rounds": rounds, "probe": ProbeConfig(every=rounds)}
    jobs.run(jobs.config_of(algorithm, folder, **{**options, **more}))
    return saved_run.open_run(folder)


def records(folder: Path, batches: int = 1, best: bool = False) -> list[ProbeRecord]:
    run = saved_run.open_run(folder)
    config = probe.options(run, folder / "probe", {})
    return [*probe.records(run, config, batches, best)]


def figures(record: ProbeRecord) -> list[float | None]:
    """All figures but those of the gradient that a round follows."""
    rows = [*record.mean_shift, *record.log_variance_ratio, *record.kl_divergence]
    by_client: list[float | None] = [value for row in rows for value in row]
    by_tensor = [
        value
        for kind in (record.deviation, record.cosine)
        for cause in CAUSES
        for value in kind[cause]
    ]
    totals = [
        each[cause] for each in (record.total_deviation, record.total_cosine) for cause in CAUSES
    ]
    return [*by_client, *by_tensor, *totals]


@pytest.mark.parametrize("algorithm", ["fedavg", "fedtan", "fedbn", "singleset", "centralised"])
def test_it_is_the_probe_of_the_next_round(algorithm: str, tmp_path: Path) -> None:
    finished(tmp_path / "short", algorithm)
    finished(tmp_path / "long", algorithm, rounds=4)
    [wanted] = probe_records.read(tmp_path / "long")
    [got] = records(tmp_path / "short")
    assert (got.round, got.layers, got.clients) == (4, wanted.layers, wanted.clients)
    assert tuple(got.total_deviation) == CAUSES
    assert figures(got) == pytest.approx(figures(wanted), abs=1e-4)
    assert got.messages == wanted.messages + {"fedtan": 4, "centralised": 4}.get(algorithm, 0)


@pytest.mark.parametrize("algorithm", ["fedtan", "silobn"])
def test_ranks_do_not_matter(algorithm: str, tmp_path: Path) -> None:
    """With 4 ranks one has no client; kept parts come from clients.pt, wherever a client is."""
    finished(tmp_path, algorithm)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    alone = records(tmp_path, batches=2)
    for ranks in (2, 4):
        for found in on_ranks(ranks, records, tmp_path, 2):
            assert [record.round for record in found] == [4, 5]
            for record, wanted in zip(found, alone, strict=True):
                assert figures(record) == pytest.approx(figures(wanted), abs=1e-4)
    assert {path: path.read_bytes() for path in before} == before
    assert figures(alone[0]) != figures(alone[1])


def test_the_best_model_can_be_probed(tmp_path: Path) -> None:
    finished(tmp_path, "fedavg")
    [last] = records(tmp_path)
    state = jobs.state_of(tmp_path)
    torch.save({name: 0.5 * value for name, value in state.items()}, tmp_path / "best.pt")
    [best] = records(tmp_path, best=True)
    assert figures(best) != figures(last)
    torch.save(state, tmp_path / "best.pt")
    [same] = records(tmp_path, best=True)
    assert figures(same) == figures(last)


@pytest.mark.parametrize("algorithm", ["fbn", "hbn", "fixbn", "fedavg_gn", "fedavg"])
def test_methods_without_statistics_of_batches_are_refused(algorithm: str, tmp_path: Path) -> None:
    model = ModelConfig(norm=NormName.ln if algorithm == "fedavg" else None)
    run = finished(tmp_path, algorithm, rounds=1, probe=ProbeConfig(), model=model)
    with pytest.raises(ConfigError) as caught:
        probe.options(run, tmp_path / "probe", {})
    [line] = caught.value.mistakes
    assert line.startswith(f"run_dir={tmp_path}: allowed is a run whose BN layers normalise")
    assert f"algorithm={algorithm}, norm" in line


def test_kept_parts_of_another_network_are_refused(tmp_path: Path) -> None:
    finished(tmp_path, "fedbn")
    states = dict(torch.load(tmp_path / "clients.pt"))
    first = next(iter(states))
    name = next(iter(states[first]))
    states[first][name] = torch.zeros(3)
    torch.save(states, tmp_path / "clients.pt")
    with pytest.raises(FileError, match=r"clients.pt: its values do not fit"):
        records(tmp_path)
    del states[first][name]
    torch.save(states, tmp_path / "clients.pt")
    with pytest.raises(FileError, match=r"clients.pt: its values do not fit"):
        records(tmp_path)
