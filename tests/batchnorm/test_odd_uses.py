"""The layer where few use it: without a shift, under another default device, out of its context."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from fedtan_hpc import average_model, convert_batchnorm, federated_statistics
from fedtan_hpc.batchnorm.running_norm import fixed_global_statistics, normalise_by_running
from fedtan_hpc.config.enums import CohortMode, PrecisionName
from fedtan_hpc.config.schema import CohortConfig
from fedtan_hpc.job.setup import prepare
from tests.helpers.rounds import CPU, iid_config


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3)
    if not bias:
        layer.register_parameter("bias", None)
    return nn.Sequential(nn.Linear(4, 3), layer, nn.Linear(3, 2)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 4, dtype=torch.float64, device="cpu"), torch.tensor([0, 1] * 3)


def test_a_layer_may_have_gamma_and_no_beta() -> None:
    x, y = batch()
    plain, ours = network(bias=False), convert_batchnorm(network(bias=False))
    cross_entropy(plain(x), y).backward()
    with federated_statistics(ours, 1.0):
        cross_entropy(ours(x), y).backward()
    for value, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, expected.grad)


def test_hbn_needs_no_beta_either() -> None:
    x, y = batch()
    model = normalise_by_running(convert_batchnorm(network(bias=False)), mixes=True).double()
    with fixed_global_statistics(model):
        cross_entropy(model(x), y).backward()


def test_another_default_device_is_left_alone() -> None:
    model = convert_batchnorm(network())
    x, y = batch()
    torch.set_default_device("meta")
    try:
        with federated_statistics(model, 0.999_999_9):
            cross_entropy(model(x), y).backward()
        average_model(model, 0.999_999_9)
    finally:
        torch.set_default_device(None)
    assert all(value.device.type == "cpu" for value in model.parameters())


def test_a_compiled_backward_pass_outside_of_its_context_is_refused() -> None:
    torch.compiler.reset()
    model = convert_batchnorm(network())
    x, y = batch()
    scores = torch.compile(model, backend="aot_eager")
    with federated_statistics(model, 1.0):
        loss = cross_entropy(scores(x), y)
    with pytest.raises(RuntimeError, match="belongs inside federated_statistics"):
        loss.backward()


def checkpointed_loss(model: nn.Module, reentrant: bool) -> torch.Tensor:
    """The checkpointed part ends in BN, so that BN is what runs again."""
    x, y = batch()
    scores = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
    return cross_entropy(scores.tanh(), y)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_a_checkpointed_backward_pass_outside_of_its_context_is_refused(
    affine: bool, reentrant: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3, affine=affine)
    model = convert_batchnorm(nn.Sequential(nn.Linear(4, 3), layer)).double()
    with federated_statistics(model, 1.0):
        loss = checkpointed_loss(model, reentrant)
    error = "belongs inside the context" if reentrant else "different metadata"
    with pytest.raises(RuntimeError, match=error):
        loss.backward()
    model.zero_grad()
    checkpointed_loss(model, reentrant).backward()  # local steps are as usual
    with federated_statistics(model, 1.0):
        checkpointed_loss(model, reentrant).backward()


def test_frozen_layers_of_a_stack_take_bfloat16() -> None:
    options = iid_config(
        "fixbn",
        clients=3,
        precision=PrecisionName.bfloat16,
        cohort=CohortConfig(mode=CohortMode.stacked),
    )
    prepare(options, CPU).train([])
