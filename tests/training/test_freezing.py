"""Frozen parts keep their values to the bit, and all ways to run clients agree about the others."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fedtan_hpc.config.enums import CohortMode, ModelName, ModelSource
from fedtan_hpc.config.schema import ClientConfig, CohortConfig, Config, ModelConfig
from fedtan_hpc.distributed import counters
from fedtan_hpc.job.setup import network, prepare
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU, distance, iid_config

FROZEN = ("1.weight", "1.bias", "2.weight", "2.bias", "2.running_mean", "2.num_batches_tracked")


def config_of(algorithm: str, freeze: list[str], **options: object) -> Config:
    model = ModelConfig(name=ModelName.mlp, freeze=freeze)
    return iid_config(algorithm, **{"model": model, "clients": 3, **options})


def trained(config: Config) -> tuple[dict[str, Tensor], int]:
    """The global model after training, and the number of messages that it took."""
    before, plain = counters.training_traffic.copy(), torch.compile
    torch.compile = partial(plain, backend="aot_eager")
    try:
        trainer = prepare(config, CPU)
        trainer.train([])
    finally:
        torch.compile = plain
    if config.compile:
        assert trainer.cohort.loss.compiled is not None
    traffic = counters.training_traffic.since(before)
    return dict(trainer.model.state_dict()), traffic.payload_messages


def initial(config: Config) -> dict[str, Tensor]:
    return dict(network(config, (1, 8, 8), 10).double().state_dict())


ALGORITHMS = ["fedtan", "fedavg_gn", "fedbn", "fixbn", "hbn", "centralised"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_frozen_parts_stay_and_the_others_train(algorithm: str) -> None:
    """A layer stands for all that is in it; without its BN layer, only parameters are frozen."""
    config = config_of(algorithm, ["[12]"])
    before, (after, _) = initial(config), trained(config)
    for name in (each for each in FROZEN if each in before):
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["4.weight"], after["4.weight"])
    everything, _ = trained(config_of(algorithm, []))
    assert not torch.equal(before["1.weight"], everything["1.weight"])


@pytest.mark.parametrize("algorithm", ["fedtan", "silobn", "centralised", "fbn"])
def test_all_ways_to_run_clients_agree(algorithm: str) -> None:
    """Stacked, in lock-step or one by one, on two ranks, and compiled."""
    freeze = ["1", "2.*"]
    expected, _ = trained(config_of(algorithm, freeze))
    one_by_one = CohortConfig(mode=CohortMode.sequential)
    ways = [trained(config_of(algorithm, freeze, cohort=one_by_one))]
    if algorithm != "fbn":
        stacked = CohortConfig(mode=CohortMode.stacked)
        ways.append(trained(config_of(algorithm, freeze, cohort=stacked)))
    ways += on_ranks(2, trained, config_of(algorithm, freeze))
    ways += on_ranks(2, trained, config_of(algorithm, freeze, compile=True))
    for state, _ in ways:
        assert distance(state, expected) < 1e-10


def test_a_frozen_layer_exchanges_nothing() -> None:
    """Three exchanges in float64, two forward and one backward, in each of three rounds."""
    _, messages = trained(config_of("fedtan", []))
    _, fewer = trained(config_of("fedtan", ["2.weight", "2.bias"]))
    assert messages - fewer == 9


def test_parameters_of_a_layer_may_be_frozen_alone() -> None:
    config = config_of("fedtan", ["*.bias"])
    before, (after, _) = initial(config), trained(config)
    assert torch.equal(before["2.bias"], after["2.bias"])
    assert not torch.equal(before["2.weight"], after["2.weight"])
    assert not torch.equal(before["2.running_mean"], after["2.running_mean"])


@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg", "centralised", "silobn"])
@pytest.mark.parametrize("freeze", [[], ["second"], ["bn"]])
def test_tensors_with_several_names_count_once_in_all_ways(
    algorithm: str, freeze: list[str]
) -> None:
    """Frozen by any of their names; with FedProx's term, also on a parameter that is not used."""
    target = "tests.helpers.networks:tangled"
    options: dict[str, object] = {
        "model": ModelConfig(source=ModelSource.import_, target=target, freeze=freeze),
        "client": ClientConfig(proximal_mu=0.1),
        "clients": 2,
        "rounds": 2,
    }
    found = []
    for mode in (CohortMode.sequential, CohortMode.stacked):
        config = iid_config(algorithm, cohort=CohortConfig(mode=mode), **options)
        found.append(trained(config)[0])
    assert distance(found[1], found[0]) < 1e-10
    before, after = initial(config), found[0]
    for name, alias in (("second", "first"), ("bn", "also_bn")):
        is_frozen = torch.equal(before[f"{alias}.weight"], after[f"{alias}.weight"])
        assert is_frozen == (name in freeze), alias
    if "bn" in freeze:
        assert torch.equal(before["bn.running_mean"], after["bn.running_mean"])
    assert not torch.equal(before["other_scale"], after["other_scale"])
