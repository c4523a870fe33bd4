"""Probes in a comparison: means over clients and seeds, heat maps, and lines in compare.md."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtan_hpc.evaluation import probe_records
from fedtan_hpc.evaluation.probe_records import ProbeRecord
from fedtan_hpc.reporting import compare, pictures, probe_plots, probe_series
from fedtan_hpc.reporting.probe_plots import Scale, short
from fedtan_hpc.reporting.probe_series import CAUSES, ProbeSeries

NOTHING = ("layers", "clients", *probe_records.DISTANCES)
SHORT = ["rounds=4", "local_steps=1", "eval_every=4", "batch_size=16", "probe.every=2"]


def record(number: int, shift: float = 0.5, size: int = 2, **more: Any) -> ProbeRecord:
    """A record of ``size`` layers and tensors, and two clients."""
    rows = [[shift, 3 * shift] for _ in range(size)]
    values: list[float | None] = [0.1 * (n + 1) for n in range(size)]
    causes: dict[str, Any] = {
        "deviation": dict.fromkeys(CAUSES, values),
        "cosine": {cause: [0.9] * size for cause in CAUSES},
        "total_deviation": dict.fromkeys(CAUSES, shift),
        "total_cosine": dict.fromkeys(CAUSES, 0.9),
    }
    return ProbeRecord(
        round=number,
        layers=[f"layer{n}" for n in range(size)],
        clients=[0, 4],
        mean_shift=rows,
        log_variance_ratio=rows,
        kl_divergence=rows,
        parameters=[f"layer{n}.weight" for n in range(size)],
        gradient_norm=[1.0] * size,
        **{**causes, **more},
    )


def series(*records: ProbeRecord) -> ProbeSeries:
    found = probe_series.of_records(records)
    assert found is not None
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The panels of each picture, by its name, colour bars included."""
    found: dict[str, list[Any]] = {}
    picture = pictures.picture

    @contextmanager
    def kept(path: Path, *shape: int, **options: Any) -> Iterator[Any]:
        with picture(path, *shape, **options) as (figure, axes):
            yield figure, axes
            figure.canvas.draw()
            found[path.name] = figure.axes

    monkeypatch.setattr(pictures, "picture", kept)
    return found


def test_a_series_has_means_over_clients_in_the_order_of_rounds() -> None:
    found = series(record(4, 2.0), record(2, 1.0))
    assert found.rounds == [2, 4]
    assert found.values["mean_shift"] == [[2.0, 4.0]] * 2
    assert found.values["deviation both"] == [[0.1, 0.1], [0.2, 0.2]]
    assert found.totals["deviation forward"] == [1.0, 2.0]


def test_a_record_without_distances_leaves_their_round_empty() -> None:
    bare = ProbeRecord(**{**vars(record(2)), **{name: [] for name in NOTHING}})
    found = series(bare, record(4), replace(bare, round=6))
    assert found.rounds == [2, 4, 6]
    assert found.values["mean_shift"] == [[None, 1.0, None]] * 2
    assert found.totals["deviation both"] == [0.5] * 3


def test_a_mean_over_seeds_has_their_common_rounds_and_known_values() -> None:
    nothing = {cause: [None, 0.4] for cause in CAUSES}
    first = series(record(1), record(2, 1.0, deviation=nothing), record(3))
    second = series(record(2, 3.0), record(3), record(4))
    mean = probe_series.mean_of([first, second, series(record(2, size=3))])
    assert mean is not None
    assert mean.rounds == [2, 3]
    assert mean.values["mean_shift"][0] == [4.0, 1.0]
    assert mean.values["deviation both"] == [[0.1, 0.1], [pytest.approx(0.3), 0.2]]
    assert mean.totals["deviation both"] == [2.0, 0.5]
    assert probe_series.mean_of([]) is None
    assert probe_series.mean_of([series(record(1)), series(record(2))]) is None
    assert probe_series.of_records([]) is None


def test_a_record_without_the_gradient_that_is_trained() -> None:
    causes = {cause: [0.1, 0.1] for cause in CAUSES[:3]}
    totals = dict.fromkeys(CAUSES[:3], 0.1)
    alone: dict[str, Any] = {"deviation": causes, "cosine": causes}
    found = series(record(1, **alone, total_deviation=totals, total_cosine=totals))
    assert "deviation trained" not in found.totals
    assert "cosine trained" not in found.values


def test_colours_are_logarithmic_where_values_ask_for_it() -> None:
    assert Scale.of([0.0, 0.5, 1.0]) == Scale(0.0, 1.0, is_log=False, is_cut=False)
    assert Scale.of([None, 0.02, 1.0]) == Scale(0.02, 1.0, is_log=True, is_cut=False)
    assert Scale.of([0.0, 1e-6, 1.0]) == Scale(1e-3, 1.0, is_log=True, is_cut=True)
    assert Scale.of([-0.5, 1.0], is_cosine=True) == Scale(-0.5, 1.0, is_log=False, is_cut=False)
    assert Scale.of([]).low < Scale.of([]).high
    assert Scale.of([0.0]).low < Scale.of([0.0]).high


def test_every_method_is_a_column_and_every_quantity_a_row(
    tmp_path: Path, drawn: dict[str, list[Any]]
) -> None:
    tiny = {cause: [1e-9, None] for cause in CAUSES}
    methods = {
        "fedtan": series(record(1), record(2, 2.0)),
        "fedavg": series(record(2, deviation=tiny)),
        "fedavg, a_very_long_option=some_value": series(record(3, size=5)),
    }
    probe_plots.draw(methods, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(probe_plots.FILES)
    assert all((tmp_path / n).read_bytes().startswith(b"\x89PNG") for n in probe_plots.FILES)
    rows = {"probe.png": 3, "probe_deviation.png": 4, "probe_cosine.png": 4}
    for name, count in rows.items():
        curves = 3 if name == "probe.png" else 0
        assert len(drawn[name]) == curves + count * (3 + 1)
    maps = [axes.images[0] for axes in drawn["probe.png"] if axes.images]
    for row in (maps[:3], maps[3:6]):
        assert len({image.get_clim() for image in row}) == 1
    assert maps[0].get_clim() == (0.0, 4.0)


@pytest.mark.parametrize("size", [1, 19, 60, 200])
def test_names_do_not_overlap(size: int, tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    found = series(*(record(number, size=size) for number in range(1, 40)))
    probe_plots.draw({"one": found, "two": found}, tmp_path)
    first = next(axes for axes in drawn["probe_deviation.png"] if axes.images)
    for labels, way in ((first.get_yticklabels(), 1), (first.get_xticklabels(), 0)):
        boxes = sorted(label.get_window_extent().get_points()[:, way].tolist() for label in labels)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(boxes))
    second = [axes for axes in drawn["probe_deviation.png"] if axes.images][1]
    assert not second.get_yticklabels()


def test_a_long_name_keeps_its_end() -> None:
    assert short("layer1.0.bn1") == "layer1.0.bn1"
    name = short("encoder.stages.3.blocks.11.norm.weight")
    assert len(name) == 24
    assert name.startswith("encoder…")
    assert name.endswith("s.11.norm.weight")


def test_a_network_without_bn_layers_has_curves_and_tensors(tmp_path: Path) -> None:
    totals: dict[str, float | None] = {"both": 0.5}
    bare = ProbeRecord(
        round=1,
        clients=[0],
        parameters=["w"],
        gradient_norm=[1.0],
        deviation={"both": [0.5]},
        cosine={"both": [0.5]},
        total_deviation=totals,
        total_cosine=totals,
    )
    probe_plots.draw({"plain": series(bare)}, tmp_path)
    assert (tmp_path / "probe.png").exists()


def test_a_comparison_has_pictures_and_lines_of_its_probes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = "methods=[fedtan,fedavg,'fedavg_gn probe.every=null','fedtan algorithm.layers=auto']"
    compare.main([methods, "seeds=[0,1]", *SHORT, f"out={tmp_path}"])
    assert (
        "compare.csv, probe.png, probe_deviation.png, probe_cosine.png" in capsys.readouterr().out
    )
    text = (tmp_path / "compare.md").read_text()
    for name in probe_plots.FILES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    assert "| fedavg_gn | forward" not in text
    for method in ("fedtan", "fedavg", "fedtan, layers=auto"):  # the last probes its first rounds
        for cause in CAUSES:
            if (method, cause) == ("fedtan, layers=auto", "both"):
                continue  # no pass is left for it
            cells = [_cell(tmp_path, method, kind, cause) for kind in ("deviation", "cosine")]
            assert f"| {method} | {cause} | {cells[0]} | {cells[1]} |" in text
    assert "| fedtan | trained | 0.000 ± 0.000 | 1.000 ± 0.000 |" in text


def test_runs_that_were_probed_in_different_rounds_have_pictures_without_a_table(
    tmp_path: Path,
) -> None:
    methods = "methods=[fedtan,'fedavg probe.every=3']"  # rounds 2 and 4, and round 3
    compare.main([methods, "seeds=[0]", *SHORT, f"out={tmp_path}"])
    text = (tmp_path / "compare.md").read_text()
    assert "Probes: no round was probed in all runs." in text
    assert "| cause |" not in text
    assert all(f"]({name})" in text and (tmp_path / name).exists() for name in probe_plots.FILES)


def _cell(out: Path, method: str, kind: str, cause: str) -> str:
    means = []
    for seed in (0, 1):
        folder = out / "runs" / f"{method.replace(', ', '-')}-seed{seed}"
        found = [each for each in probe_records.read(folder) if each.round in (2, 4)]
        assert len(found) == 2
        means.append(statistics.mean(getattr(each, f"total_{kind}")[cause] for each in found))
    assert all(math.isfinite(mean) for mean in means)
    return f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}"


def test_a_comparison_without_probes_has_none_of_it(tmp_path: Path) -> None:
    words = ["methods=[fedavg]", "seeds=[0]", *SHORT[:-1], f"out={tmp_path}"]
    compare.main(words)
    assert "Probes" not in (tmp_path / "compare.md").read_text()
    assert not (tmp_path / "probe.png").exists()
