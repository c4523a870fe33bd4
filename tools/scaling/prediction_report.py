"""The files of a prediction: all figures, tables, and a picture of efficiency against ranks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtan_hpc.files import atomic_files
from fedtan_hpc.reporting import options, pictures
from scaling import plots

_LABELS = {
    "fedtan": "fedtan: 2 messages a layer",
    "three_messages": "as in the paper: 3 messages a layer",
}
_TERMS = ("compute", "statistics", "gradients", "average", "client", "waiting")
_REMEDIES = ("local_steps", "batch_size", "synchronise_every")
_REMARKS = """
All of this is computed; nothing ran on so many ranks.  The assumptions are:

- A step takes the same time on every rank.  `waiting` has the time that messages wait for late
  ranks, where the network was measured; it is unknown for the others, whose rounds are therefore
  lower bounds.
- The clients of a rank take their steps one after another; messages overlap with nothing.
- Efficiency is the share of a round that the busiest rank spends on local steps.
- `average` includes the sum of the clients' losses; evaluation and checks are left out.
- `three_messages` is FedTAN as in the paper: mean, variance, derivatives in float32.
- The last columns have the value of each option that alone reaches {target}; a step's time is
  proportional to the batch size.
"""

Rows = Sequence[Mapping[str, Any]]


def write(out: Path, setting: Mapping[str, Any], rows: Rows, command: str) -> None:
    """Writes ``prediction.json``, ``.md`` and ``.png``, and prints the conclusions."""
    content = {"command": command, "setting": setting, "predictions": rows}
    with options.written(out):
        atomic_files.replace_text(out / "prediction.json", json.dumps(content, indent=1) + "\n")
        text = "\n".join(_markdown(setting, rows, command))
        atomic_files.replace_text(out / "prediction.md", text)
        _draw(setting, rows, out / "prediction.png")
    print("\n".join(_conclusions(setting, rows)))
    print(f"files: {out}/prediction.md, prediction.json, prediction.png")


def _conclusions(setting: Mapping[str, Any], rows: Rows) -> Iterator[str]:
    """Yields a line on FedTAN for each network and number of ranks."""
    for row in rows:
        if row["method"] == "fedtan":
            remedies = row["for_target"]
            yield (
                f"{row['network']}, {row['ranks']} ranks: {_time(row['seconds_a_round'])} a round, "
                f"efficiency {100 * row['efficiency']:.1f} %, largest term {row['largest_term']}; "
                f"for {_target(setting)} local_steps: {remedies['local_steps']}, batch_size: "
                f"{remedies['batch_size']}, algorithm.synchronise_every: "
                f"{remedies['synchronise_every']}"
            )


def _target(setting: Mapping[str, Any]) -> str:
    return f"{100 * setting['target_efficiency']:.0f} %"


def _markdown(setting: Mapping[str, Any], rows: Rows, command: str) -> Iterator[str]:
    measured = setting["step_measured_here"]
    origin = f"measured here: {setting['machine']}, threads {setting['threads']}"
    kinds = {
        "": "A local step of a client takes",
        "synchronised_": "one with global statistics",
        "pooled_": "one of pooled gradients",
    }
    times = {name: setting[f"{kind}step_seconds"] for kind, name in kinds.items()}
    steps = [f"{name} {_time(value)}" for name, value in times.items() if value is not None]
    yield "# Predicted rounds on more ranks"
    yield f"\n    {command}\n"
    yield (
        f"{setting['model']}, {'x'.join(map(str, setting['shape']))} inputs, "
        f"{setting['parameters']:,} parameters, {setting['batchnorm_layers']} BN layers with "
        f"{setting['channels']:,} channels; batches of {setting['batch_size']}, "
        f"{setting['local_steps']} local steps a round. {', '.join(steps)} "
        f"({origin if measured else 'given'}, torch {setting['torch']})."
    )
    if measured:
        yield "For another machine set its time: `compute_seconds=...`."
    for network in setting["networks"]:
        yield from _section(network, setting, rows)
    yield _REMARKS.format(target=_target(setting))


def _section(network: Mapping[str, Any], setting: Mapping[str, Any], rows: Rows) -> Iterator[str]:
    yield f"\n## {network['name']}"
    yield (
        f"\n{network['source']}. In the model: {_time(network['alpha_s'])} a step, "
        f"{1e-6 / max(network['beta_s_per_byte'], 1e-15):,.0f} MB/s, sums by "
        f"{' or '.join(network['algorithms'])}.{_fit(network)}\n"
    )
    heads = ["ranks", "clients of a rank", "method", "a round", "efficiency, %", *_TERMS]
    heads += ["largest", f"for {_target(setting)}: local_steps", "batch_size", "synchronise_every"]
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    for row in rows:
        if row["network"] == network["name"]:
            yield f"| {' | '.join(_cells(row))} |"


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [str(row["ranks"]), str(row["clients_of_a_rank"]), row["method"]]
    cells += [_time(row["seconds_a_round"]), f"{100 * row['efficiency']:.1f}"]
    cells += [_time(row[f"{name}_seconds"]) for name in _TERMS]
    return [*cells, row["largest_term"], *(str(row["for_target"][name]) for name in _REMEDIES)]


def _fit(network: Mapping[str, Any]) -> str:
    """Returns the errors of a fit on its measured ranks; more ranks are an extrapolation."""
    if network["ranks_measured"] is None:
        return ""
    waits = [f"{_time(wait)} after {_time(computed)}" for computed, wait in network["waits"]]
    median, worst = 100 * network["median_error"], 100 * network["worst_error"]
    return (
        f" A sum after computing waits {', '.join(waits)}. Off by {median:.0f} % (median) and "
        f"{worst:.0f} % (worst) on the {network['ranks_measured']} measured ranks; more ranks are "
        "an extrapolation along the same links."
    )


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} µs" if seconds else "0"


def _draw(setting: Mapping[str, Any], rows: Rows, path: Path) -> None:
    """Draws efficiency against ranks: a panel for each network, a line for each method."""
    names = [network["name"] for network in setting["networks"]]
    shape = {"figsize": (1.0 + 3.0 * len(names), 3.6), "sharey": True, "squeeze": False}
    with pictures.picture(path, 1, len(names), **shape) as (figure, [panels]):
        for axes, name in zip(panels, names, strict=True):
            of_network = [row for row in rows if row["network"] == name]
            plots.draw_methods(axes, of_network, "efficiency", _LABELS)
            axes.axhline(100 * setting["target_efficiency"], color=pictures.GREY, ls=":", lw=1)
            axes.set_ylim(0, 103)
            axes.set_title(name)
        panels[0].set_ylabel("predicted efficiency, %")
        pictures.legend_beside(figure, panels[0], f"dotted: {_target(setting)}")
