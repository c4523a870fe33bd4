"""The files of a prediction: all figures, tables, and a picture of efficiency against ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtan_hpc.reporting import options
from fedtan_hpc.reporting.comparison_plots import look_of
from fedtan_hpc.runtime import atomic_files

_LOOKS = {"three_messages": ("#E69F00", "X")}
_LABELS = {
    "fedtan": "fedtan, 2 messages a layer",
    "three_messages": "FedTAN as in the paper, 3 messages a layer",
}
_TERMS = ("compute", "statistics", "gradients", "average", "waiting")
_REMEDIES = ("local_steps", "batch_size", "synchronise_every")

Rows = Sequence[Mapping[str, Any]]


def write(out: Path, setting: Mapping[str, Any], rows: Rows, command: str) -> None:
    """``prediction.json``, ``prediction.md`` and ``prediction.png``, and how it ends."""
    content = {"command": command, "setting": setting, "predictions": rows}
    with options.written(out):
        atomic_files.replace_text(out / "prediction.json", json.dumps(content, indent=1) + "\n")
        atomic_files.replace_text(
            out / "prediction.md", "\n".join(markdown(setting, rows, command))
        )
        draw(setting, rows, out / "prediction.png")
    print("\n".join(conclusions(setting, rows)))
    print(f"files: {out}/prediction.md, prediction.json, prediction.png")


def conclusions(setting: Mapping[str, Any], rows: Rows) -> Iterator[str]:
    """A line on FedTAN for each network and number of ranks."""
    target = f"{100 * setting['target_efficiency']:.0f} %"
    for row in rows:
        if row["method"] == "fedtan":
            ways = row["for_target"]
            yield (
                f"{row['network']}, {row['ranks']} ranks: {_told(row['seconds_a_round'])} a round, "
                f"efficiency {100 * row['efficiency']:.1f} %, largest term {row['largest_term']}; "
                f"for {target} local_steps: {ways['local_steps']}, batch_size: "
                f"{ways['batch_size']}, algorithm.synchronise_every: {ways['synchronise_every']}"
            )


def markdown(setting: Mapping[str, Any], rows: Rows, command: str) -> Iterator[str]:
    """What was assumed, and a table for each network."""
    here = setting["step_measured_here"]
    how = f"measured here: {setting['machine']}, threads {setting['threads']}" if here else "given"
    others = ("synchronised", "one with global statistics"), ("pooled", "one of pooled gradients")
    more = "".join(
        f", {what} {_told(setting[f'{kind}_step_seconds'])}"
        for kind, what in others
        if setting[f"{kind}_step_seconds"] is not None
    )
    yield "# Predicted rounds on more ranks"
    yield f"\n    {command}\n"
    yield (
        f"{setting['model']}, {'x'.join(map(str, setting['shape']))} inputs, "
        f"{setting['parameters']:,} parameters, {setting['batchnorm_layers']} BN layers with "
        f"{setting['channels']:,} channels; batches of {setting['batch_size']}, "
        f"{setting['local_steps']} local steps a round. A local step of a client takes "
        f"{_told(setting['step_seconds'])}{more} ({how}, torch {setting['torch']})."
    )
    if here:
        yield "For another machine give that one's: `compute_seconds=...`."
    for network in setting["networks"]:
        yield from _section(network, setting, rows)
    yield from _remarks(setting)


def _section(network: Mapping[str, Any], setting: Mapping[str, Any], rows: Rows) -> Iterator[str]:
    yield f"\n## {network['name']}"
    yield (
        f"\n{network['source']}. In the model: {_told(network['alpha_s'])} a step, "
        f"{1e-6 / max(network['beta_s_per_byte'], 1e-15):,.0f} MB/s, sums by "
        f"{' or '.join(network['algorithms'])}.{_fit(network)}\n"
    )
    target = f"for {100 * setting['target_efficiency']:.0f} %:"
    heads = ["ranks", "clients of a rank", "method", "a round", "efficiency, %", *_TERMS]
    heads += ["largest", f"{target} local_steps", "batch_size", "synchronise_every"]
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    for row in rows:
        if row["network"] == network["name"]:
            yield f"| {' | '.join(_cells(row))} |"


def _cells(row: Mapping[str, Any]) -> list[str]:
    ways = [str(row["for_target"][name]) for name in _REMEDIES]
    spent = [_told(row[f"{name}_seconds"]) for name in _TERMS]
    first = [str(row["ranks"]), str(row["clients_of_a_rank"]), row["method"]]
    whole = [_told(row["seconds_a_round"]), f"{100 * row['efficiency']:.1f}"]
    return [*first, *whole, *spent, row["largest_term"], *ways]


def _fit(network: Mapping[str, Any]) -> str:
    """How far a fit is from its measurements, and that more ranks are more than it knows."""
    if network["ranks_measured"] is None:
        return ""
    waits = ", ".join(f"{_told(wait)} after {_told(taken)}" for taken, wait in network["waits"])
    median, worst = 100 * network["median_error"], 100 * network["worst_error"]
    return (
        f" A sum after computing waits {waits}. Off by {median:.0f} % (median) and {worst:.0f} % "
        f"(worst) on the {network['ranks_measured']} ranks it was measured on; more of them are an "
        "extrapolation along the same links."
    )


def _remarks(setting: Mapping[str, Any]) -> Iterator[str]:
    yield "\nAll of this is computed; nothing ran on so many ranks. What is taken to be so:\n"
    yield "- A step takes as long on every rank. What messages wait for ranks that are late is in"
    yield "  `waiting` where the network was measured; it is not known for the others, whose rounds"
    yield "  are therefore the least that they can be."
    yield "- Clients of a rank take their steps in turn; messages overlap with nothing."
    yield "- Efficiency is the share of a round that the busiest rank spends on local steps."
    yield "- `average` has the sum of the clients' losses in it; evaluation and checks are apart."
    yield "- `three_messages` is FedTAN as in the paper: mean, variance, derivatives in float32."
    yield (
        "- The last columns have what each option would have to be, alone, for "
        f"{100 * setting['target_efficiency']:.0f} %; batches are taken to cost what they hold."
    )
    yield ""


def _told(seconds: float) -> str:
    """Three digits, and a unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} µs" if seconds else "0"


def draw(setting: Mapping[str, Any], rows: Rows, path: Path) -> None:
    """Efficiency against ranks, a panel for each network and a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [network["name"] for network in setting["networks"]]
    figure, panels = pyplot.subplots(
        1,
        len(names),
        figsize=(1.5 + 4.2 * len(names), 4.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, name in zip(panels[0], names, strict=True):
        _panel(panel, [row for row in rows if row["network"] == name], setting)
        panel.set_title(name)
    panels[0][0].set_ylabel("efficiency, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(
        f"Predicted: {setting['model']}, {setting['local_steps']} local steps of "
        f"{_told(setting['step_seconds'])} a round"
    )
    atomic_files.replace(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)


def _panel(axes: Any, rows: Rows, setting: Mapping[str, Any]) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        colour, marker = _LOOKS[method] if method in _LOOKS else look_of(method)
        axes.plot(
            [row["ranks"] for row in mine],
            [100 * row["efficiency"] for row in mine],
            color=colour,
            marker=marker,
            markersize=5,
            label=_LABELS.get(method, method),
        )
    axes.axhline(100 * setting["target_efficiency"], color="#7F7F7F", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    sizes = sorted({row["ranks"] for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("ranks")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.3)
