"""What a run reports: a record of each round, and a summary at the end.  Loads without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

Metrics = Mapping[str, Any]
"""Test metrics of a task by their names in rounds.jsonl, such as test_iou: numbers, or lists of
them with one for each class (None for a class without test samples)."""


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One line of ``rounds.jsonl``.  Evaluation figures are null in rounds without evaluation."""

    round: int
    """Number of the round, from 1."""
    train_loss: float
    """sum_k p_k times client k's mean loss over its local steps, before each step."""
    test_loss: float | None = None
    """Mean loss of the task on the test set; for classification the cross-entropy."""
    test_accuracy: float | None = None
    """Share of right answers on the test set, 0 to 1; only classification has it.

    That of the global model; if clients have models of their own, the mean over these models.
    """
    pooled_train_loss: float | None = None
    """sum_k p_k F_k on the training samples (``eval_train_samples`` of them), after the round."""
    clients_judged: int | None = None
    """Clients whose models are evaluated, or that have test samples of their own; else null."""
    clients_test_accuracy_mean: float | None = None
    """Mean accuracy of the clients' models on the test set; null if there is a global model."""
    clients_test_accuracy_spread: float | None = None
    """Sample standard deviation over the clients of the accuracy on the test set."""
    clients_own_mix_accuracy_mean: float | None = None
    """Mean accuracy on the clients' own data, of their models or else of the global model.

    A client's own data are its own test samples; without such, test samples in its label mix, on
    which only clients' models are evaluated.
    """
    clients_own_mix_accuracy_spread: float | None = None
    """Sample standard deviation over the clients of the accuracy on their own data."""
    learning_rate: float
    round_seconds: float
    """Wall time of local steps and average on rank 0, without evaluation and checks."""
    comm_messages: int
    """Collectives of BN statistics and model average on rank 0."""
    comm_bytes: int
    """Bytes that rank 0 puts into these collectives."""
    payload_messages: int
    """As ``comm_messages``, but also counted in a single process, which sends nothing."""
    payload_bytes: int
    """As ``comm_bytes``, but also counted in a single process, which sends nothing."""
    clients: int
    """Clients that took part."""
    statistics_seconds: float = 0.0
    """The part of ``round_seconds`` in collectives of BN statistics, on rank 0's host."""
    client_messages: int = 0
    """Collectives between the ranks that hold one client, on rank 0; only with ranks_per_client."""
    client_bytes: int = 0
    """Bytes that rank 0 puts into these collectives."""
    client_seconds: float = 0.0
    """The part of ``round_seconds`` in these collectives, on rank 0's host."""
    average_seconds: float = 0.0
    """The part of ``round_seconds`` in collectives of models, gradients and private states."""
    evaluation_seconds: float = 0.0
    """Evaluation and checks, which ``round_seconds`` does not include."""
    metrics: Metrics = field(default_factory=dict)
    """The task's test metrics beside ``test_accuracy``; in rounds.jsonl each stands by itself."""

    def line(self) -> dict[str, Any]:
        """Returns what rounds.jsonl has of the round: the fields, with each of ``metrics``."""
        values = asdict(self)
        metrics = values.pop("metrics")
        return {**values, **metrics}

    @classmethod
    def of_line(cls, values: Mapping[str, Any]) -> RoundRecord:
        """Returns the record of a line; names test_... and clients_... of no field are metrics.

        Raises ``TypeError`` if a name is missing.
        """
        known = {each.name for each in fields(cls)} - {"metrics"}
        prefixes = ("test_", "clients_")
        metrics = {k: v for k, v in values.items() if k.startswith(prefixes) and k not in known}
        return cls(**{k: v for k, v in values.items() if k in known}, metrics=metrics)


@dataclass(frozen=True)
class Summary:
    """``summary.json``: the result of a run and what it ran on."""

    algorithm: str
    rounds: int
    """Rounds that were trained."""
    test_accuracy: float | None
    """Share of right answers on the test set after the last round, 0 to 1; only classification."""
    test_loss: float
    total_seconds: float
    """From the start of ``run`` to the final model, with start-up and evaluation."""
    startup_seconds: float
    """The part of ``total_seconds`` before the first round."""
    median_round_seconds: float
    peak_memory_bytes: int
    """Largest memory use of any rank's process; on a GPU, of the GPU's memory."""
    world_size: int
    backend: str
    """Backend of the collectives; "none" in a single process."""
    device: str
    parameters: int
    """Trainable values of the model."""
    versions: dict[str, str]
    run_dir: str
    machine: str = ""
    """GPU or CPUs of rank 0."""
    judged: str = "global model"
    """What the test figures are of: the global model, or the mean over the clients' own models."""
    pooled_train_loss: float | None = None
    clients_judged: int | None = None
    clients_test_accuracy_mean: float | None = None
    clients_test_accuracy_spread: float | None = None
    clients_own_mix_accuracy_mean: float | None = None
    clients_own_mix_accuracy_spread: float | None = None
    """These six figures are those of the last ``RoundRecord``."""
    data: dict[str, Any] = field(default_factory=dict)
    """Of the data: shape of a sample, classes, class_names, and normalisation: mean and deviation.

    Inputs were (value - mean) / deviation by channel; pixels of bytes have values 0 to 255.
    """
    compile_seconds: float = 0.0
    """The part of ``startup_seconds`` that compiles the training step; 0 if it runs eagerly."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of a round by phase: medians over rounds of means over ranks."""
    metrics: Metrics = field(default_factory=dict)
    """The task's test metrics after the last round, beside ``test_accuracy``."""
    resumed_after: list[int] = field(default_factory=list)
    """Rounds after which the run was interrupted and resumed; times leave the gaps out."""
    stopped_early: str = ""
    """Why the run ended before ``Config.rounds`` rounds; empty if it did not."""
    best_round: int = 0
    """Round of the best evaluation, by early_stopping.metric or else accuracy, or else loss."""
    best_value: float | None = None
    """The metric in that round."""


def headline(result: RoundRecord | Summary, digits: int = 2) -> tuple[str, str]:
    """Returns name and value of the first test metric: accuracy in %, or another by its name."""
    if result.test_accuracy is not None:
        return "test accuracy", f"{100 * result.test_accuracy:.{digits}f} %"
    name = first_metric(result.metrics)
    value = result.test_loss if name == "test_loss" else result.metrics[name]
    return name.replace("_", " "), f"{value:.{digits + 2}f}"


def first_metric(figures: Mapping[str, Any]) -> str:
    """Returns the name of the first test metric that is a number; test_loss if there is none."""
    if figures.get("test_accuracy") is not None:
        return "test_accuracy"
    numbers = [name for name, value in figures.items() if isinstance(value, float)]
    metrics = [name for name in numbers if name.startswith("test_") and name != "test_loss"]
    return next(iter(metrics), "test_loss")


def over_clients(summary: Summary) -> dict[str, float]:
    """Returns the figures over clients of the first metric: ``own_mix_mean``, ``test_spread``...

    Leaves out those that the run does not have.
    """
    figures = {"test_accuracy": summary.test_accuracy, **summary.metrics}
    metric = first_metric(figures).removeprefix("test_")
    names = ("test_mean", "test_spread", "own_mix_mean", "own_mix_spread")
    found = {}
    for name in names:
        what, _, kind = name.rpartition("_")
        full = f"clients_{what}_{metric}_{kind}"
        value = summary.metrics.get(full, getattr(summary, full, None))
        if value is not None:
            found[name] = float(value)
    return found
