"""What the model average leaves out: FedBN in a loop of one's own, and mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedtan_hpc import FedTANBatchNorm, average_model, average_models, convert_batchnorm
from tests.helpers import networks
from tests.helpers.ranks import on_ranks

Values = dict[str, Tensor]
P = [0.25, 0.75]


def new_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
    return convert_batchnorm(nn.Sequential(*layers)).double()


def train(model: nn.Module, client: int, round_number: int) -> None:
    generator = torch.Generator().manual_seed(10 * round_number + client)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64) + client
        optimizer.zero_grad()
        cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()


def fedbn_on_ranks(exclude: list[Any]) -> Values:
    model, rank = new_model(), dist.get_rank()
    for number in range(3):
        train(model, rank, number)
        average_model(model, P[rank], exclude=exclude)
    return {name: value.clone() for name, value in model.state_dict().items()}


def fedbn_by_hand() -> list[Values]:
    """Both clients in one process; all but layer 1 is the weighted mean after each round."""
    models = [new_model(), new_model()]
    for number in range(3):
        for client, model in enumerate(models):
            train(model, client, number)
        states = [model.state_dict() for model in models]
        for name in (each for each in states[0] if not each.startswith("1.")):
            mean = P[0] * states[0][name] + P[1] * states[1][name]
            for state in states:
                state[name].copy_(mean)
    return [dict(model.state_dict()) for model in models]


@pytest.mark.parametrize("exclude", [[FedTANBatchNorm], ["1"], ["1.*"], [nn.BatchNorm1d, "1.w*"]])
def test_fedbn_in_a_loop_is_fedbn_by_hand(exclude: list[Any]) -> None:
    expected = fedbn_by_hand()
    assert not torch.equal(expected[0]["1.weight"], expected[1]["1.weight"])
    for found, state in zip(on_ranks(2, fedbn_on_ranks, exclude), expected, strict=True):
        for name, value in state.items():
            assert float((found[name] - value).abs().max()) < 1e-12, name


def test_models_of_one_rank_keep_their_parts() -> None:
    models = [new_model(), new_model()]
    for client, model in enumerate(models):
        train(model, client, 0)
    kept = [model.state_dict()["1.weight"].clone() for model in models]
    average_models(models, P, exclude=[FedTANBatchNorm])
    states = [model.state_dict() for model in models]
    assert torch.equal(states[0]["0.weight"], states[1]["0.weight"])
    assert all(torch.equal(s["1.weight"], value) for s, value in zip(states, kept, strict=True))


def message_where_ranks_exclude_other_parts(model_was_averaged: bool) -> str:
    model = new_model()
    if model_was_averaged:
        average_model(model, P[dist.get_rank()], exclude=["1"])
    with pytest.raises((ValueError, RuntimeError)) as caught:
        average_model(model, P[dist.get_rank()], exclude=["1"] if dist.get_rank() else ["3"])
    return str(caught.value)


@pytest.mark.parametrize("model_was_averaged", [False, True])
def test_ranks_must_exclude_the_same(model_was_averaged: bool) -> None:
    for message in on_ranks(2, message_where_ranks_exclude_other_parts, model_was_averaged):
        assert "differ" in message or "different" in message


@pytest.mark.parametrize(
    ("exclude", "words"),
    [(["1", "bn"], "bn matches no tensor"), (["*"], "leaves nothing to average")],
)
def test_parts_that_cannot_be_meant_are_mistakes(exclude: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        average_model(new_model(), 1.0, exclude=exclude)


@pytest.mark.parametrize("exclude", [["second"], "second", ["first"]])
def test_each_name_of_a_shared_tensor_counts(exclude: Any) -> None:
    models = [networks.tangled((1, 2, 2), 3) for _ in range(2)]
    before = [{n: v.clone() for n, v in model.state_dict().items()} for model in models]
    average_models(models, P, exclude=exclude)
    for model, old in zip(models, before, strict=True):
        assert torch.equal(model.state_dict()["first.weight"], old["first.weight"])
        assert not torch.equal(model.state_dict()["head.weight"], old["head.weight"])
