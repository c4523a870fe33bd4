"""The trial of a stack finds what would fail in a round, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fedtan_hpc
from fedtan_hpc.config.enums import AlgorithmName, CohortMode, ModelSource
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import AlgorithmConfig, CohortConfig, Config, ModelConfig
from fedtan_hpc.training import client_runners

if TYPE_CHECKING:  # Python 3.10 has it in typing_extensions only
    from typing_extensions import Self


class Base(nn.Module):
    """A network with BN and buffers; ``hidden`` is what the networks below change."""

    centre: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 10)
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def hidden(self, x: Tensor) -> Tensor:
        return self.stem(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))  # type: ignore[no-any-return]


class ReplacesBuffer(Base):
    def hidden(self, x: Tensor) -> Tensor:
        y = super().hidden(x)
        self.centre = 0.9 * self.centre + 0.1 * y.detach().mean(0)
        return y - self.centre


class ChangesBuffer(Base):
    def hidden(self, x: Tensor) -> Tensor:
        self.centre.mul_(0.9).add_(0.1)
        return super().hidden(x) - self.centre


class Counts(Base):
    def hidden(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().hidden(x)


class Checkpointed(Base):
    def hidden(self, x: Tensor) -> Tensor:
        return checkpoint(self.stem, x, use_reentrant=False)  # type: ignore[no-any-return]


class Branches(Base):
    def hidden(self, x: Tensor) -> Tensor:
        y = super().hidden(x)
        return y if y.sum() > 0 else -y


class FrozenPart(Base):
    """Its BN layer always normalises by its running statistics."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.stem.requires_grad_(False).eval()
        return self


def spectral() -> nn.Module:
    network = Base()
    nn.utils.parametrizations.spectral_norm(network.head)
    return network


FITTING = {"base": Base, "frozen part": FrozenPart}
FAILING = {
    "replaced buffer": (ReplacesBuffer, "the forward pass replaces the buffer centre"),
    "changed buffer": (ChangesBuffer, "attempted to call in-place operation"),
    "counter": (Counts, "attempted to call in-place operation"),
    "activation checkpointing": (Checkpointed, "saved tensor hooks"),
    "branch on values": (Branches, "data-dependent control flow"),
    "spectral norm": (spectral, "Batching rule not implemented"),
}


def job(name: str, folder: Path, algorithm: str = "fedtan", **options: object) -> Config:
    return Config(
        algorithm=AlgorithmConfig(name=AlgorithmName(algorithm)),
        model=ModelConfig(source=ModelSource.import_, target=f"{__name__}:{name}"),
        clients=3,
        rounds=2,
        local_steps=2,
        eval_every=2,
        run_dir=str(folder),
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets ``model.target`` make the network of a case."""
    case = str(request.param)
    make = FITTING[case] if case in FITTING else FAILING[case][0]
    monkeypatch.setattr(f"{__name__}.chosen", make)
    return case


def chosen() -> nn.Module:
    raise AssertionError("a test sets it")


STACKED = CohortConfig(mode=CohortMode.stacked)


@pytest.mark.parametrize("made", FITTING, indirect=True)
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg", "fixbn", "centralised"])
def test_what_passes_the_trial_runs_stacked_as_in_sequence(
    made: str, algorithm: str, tmp_path: Path
) -> None:
    losses = []
    for folder, cohort in (("stacked", STACKED), ("in sequence", CohortConfig())):
        config = job("chosen", tmp_path / folder, algorithm, cohort=cohort)
        losses.append(fedtan_hpc.run(config, callbacks=[]).test_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("made", FAILING, indirect=True)
def test_what_would_fail_in_a_round_is_one_line_before_it(made: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ConfigError) as caught:
        fedtan_hpc.run(job("chosen", tmp_path / "run", cohort=STACKED), callbacks=[])
    [line] = caught.value.mistakes
    assert line.startswith("cohort.mode=stacked: allowed is auto or sequential, ")
    assert FAILING[made][1] in line
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", ["activation checkpointing", "base"], indirect=True)
def test_on_a_gpu_the_reason_for_another_way_is_told(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client_runners, "is_on_gpu", lambda model: True)
    fedtan_hpc.run(job("chosen", tmp_path / "run"), callbacks=[])
    said = capsys.readouterr().err
    if made == "base":
        assert said == ""
        return
    assert said.startswith("cohort.mode=auto: the clients of a rank run in lock-step or ")
    assert "saved tensor hooks" in said
