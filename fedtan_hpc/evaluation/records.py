"""What a run reports: one record a round, one summary at the end, and who writes them down."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoundRecord:
    """One line of ``rounds.jsonl``."""

    round: int
    """From 1."""
    train_loss: float
    """sum_k p_k times client k's mean loss over its local steps, before each step."""
    test_loss: float | None
    """Mean cross-entropy on the test set; null if the round was not evaluated."""
    test_accuracy: float | None
    """Share of right answers on the test set, 0 to 1; null if not evaluated.

    Of the global model; where clients have models of their own, the mean over those judged.
    """
    pooled_train_loss: float | None
    """sum_k p_k F_k on the training samples (``eval_train_samples`` of them), after the round."""
    clients_judged: int | None
    """Clients whose own models were judged; null where there is one global model."""
    clients_test_accuracy_mean: float | None
    """Of the clients' own models on the global test set; null where there is one global model."""
    clients_test_accuracy_spread: float | None
    """Sample deviation of the same over the clients."""
    clients_own_mix_accuracy_mean: float | None
    """The same models, each on test samples in its client's own mix of labels."""
    clients_own_mix_accuracy_spread: float | None
    """Sample deviation of the same over the clients."""
    learning_rate: float
    round_seconds: float
    """Wall time of local steps and average on rank 0; evaluation and checks are apart."""
    comm_messages: int
    """Collectives of BN statistics and model average on rank 0."""
    comm_bytes: int
    """Payload of those collectives that rank 0 put in, in bytes."""
    payload_messages: int
    payload_bytes: int
    """The same two, counted in a single process too, which has nobody to send anything to."""
    clients: int
    """Clients that took part."""
    statistics_seconds: float = 0.0
    """Of ``round_seconds``, those in collectives of BN statistics, on rank 0's host."""
    average_seconds: float = 0.0
    """The same of the model average, pooled gradients and private states."""
    evaluation_seconds: float = 0.0
    """Evaluation and checks, beside ``round_seconds``."""


@dataclass(frozen=True)
class Summary:
    """``summary.json``: the result of a run and what it ran on."""

    algorithm: str
    rounds: int
    test_accuracy: float
    """Share of right answers on the test set after the last round, 0 to 1."""
    test_loss: float
    total_seconds: float
    """From the start of ``run`` to the final model, start-up and evaluation included."""
    startup_seconds: float
    """Of ``total_seconds``, those before the first round."""
    median_round_seconds: float
    peak_memory_bytes: int
    """Most memory of any rank's process; on a GPU, of the GPU's memory."""
    world_size: int
    backend: str
    """Carrier of the collectives; "none" in a single process."""
    device: str
    parameters: int
    """Trainable values of the model."""
    versions: dict[str, str]
    run_dir: str
    machine: str = ""
    """What rank 0 computed on."""
    judged: str = "global model"
    """What the test figures are of: the global model, or the mean over the clients' own models."""
    pooled_train_loss: float | None = None
    clients_judged: int | None = None
    clients_test_accuracy_mean: float | None = None
    clients_test_accuracy_spread: float | None = None
    clients_own_mix_accuracy_mean: float | None = None
    clients_own_mix_accuracy_spread: float | None = None
    """These six as in the last line of ``rounds.jsonl``."""
    compile_seconds: float = 0.0
    """Of ``startup_seconds``, those for compiling the training step; 0 if it runs eagerly."""
    phases: dict[str, float] = field(default_factory=dict)
    """Where a round's time goes (``phases``): seconds, medians over rounds of means over ranks."""
    resumed_after: list[int] = field(default_factory=list)
    """Rounds after which the run was interrupted and taken up; times are without the gaps."""


class RoundCallback:
    """Writes nothing: for every rank but 0."""

    def round(self, record: RoundRecord) -> None:
        """Take note of a round."""

    def close(self) -> None:
        """Nothing more comes."""
