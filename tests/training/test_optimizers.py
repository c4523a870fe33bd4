"""Optimizers of the clients: against plain loops, and alike in every way to run clients."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from fedtan_hpc.config.enums import (
    CohortMode,
    ModelName,
    OptimizerName,
    PartitionName,
)
from fedtan_hpc.config.schema import (
    ClientConfig,
    CohortConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
)
from fedtan_hpc.data import datasets, partition
from fedtan_hpc.data.batching import BatchSampler
from fedtan_hpc.job.setup import network, prepare
from fedtan_hpc.models import factory
from fedtan_hpc.training.client_runners import StackedRunner
from fedtan_hpc.training.optimizers import ClientOptimizer, OptimizerSettings, undecayed_names
from tests.helpers.methods import close, config
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU, distance

BEFORE_BN = ("1.bias", "4.bias")
"""Their gradient is 0 up to rounding, which Adam scales up; they change nothing."""
ADAM, ADAMW = OptimizerName.adam, OptimizerName.adamw
SETTINGS: dict[str, OptimizerConfig] = {
    "nesterov": OptimizerConfig(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": OptimizerConfig(name=ADAM, lr=0.01, eps=1e-3, weight_decay=0.01, clip_norm=0.3),
    "adamw": OptimizerConfig(
        name=ADAMW, lr=0.01, betas=[0.8, 0.95], weight_decay=0.1, decay_norm=False
    ),
    "clipped": OptimizerConfig(
        lr=0.1, momentum=0.5, weight_decay=0.1, clip_norm=0.2, decay_norm=False
    ),
}


def plain_step(
    values: Mapping[str, Tensor], state: dict[str, list[Tensor]], step: int, o: OptimizerConfig
) -> None:
    """Takes a step with formulas of the papers, and keeps two tensors of state a parameter."""
    norm = sqrt(sum(float(w.grad.square().sum()) for w in values.values() if w.grad is not None))
    factor = 1.0 if o.clip_norm is None else min(1.0, o.clip_norm / norm)
    for name, w in values.items():
        assert w.grad is not None
        g = factor * w.grad
        decays = o.decay_norm or not (name[0] in "25" or name.endswith("bias"))
        decay = o.weight_decay if decays else 0.0
        m, v = state.setdefault(name, [torch.zeros_like(w), torch.zeros_like(w)])
        if o.name is OptimizerName.sgd:
            g = g + decay * w.data
            m = g + o.momentum * m
            change = g + o.momentum * m if o.nesterov else m
        else:
            b1, b2 = o.betas or (0.9, 0.999)
            g = g if o.name is ADAMW else g + decay * w.data
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            root = (v / (1 - b2**step)).sqrt() + (1e-8 if o.eps is None else o.eps)
            change = m / (1 - b1**step) / root
            if o.name is ADAMW:
                change = change + decay * w.data
        state[name] = [m, v]
        w.data -= o.lr * change


def job(algorithm: str, name: str, **options: object) -> Config:
    """Returns a job of four unequal clients; some have batches that are not whole."""
    return config(
        algorithm,
        **{"optimizer": SETTINGS[name], "batch_size": 64, "rounds": 2, "eval_every": 2, **options},
    )


def trained(options: Config, stacks_first_steps: bool = False) -> tuple[dict[str, Tensor], float]:
    """Returns the global model and the last training loss."""
    trainer = prepare(options, CPU)
    if stacks_first_steps:
        runners = trainer.cohort.runner
        runners.stacked = StackedRunner(runners.models, all_steps=False, max_stacked=2)
    records = trainer.train([])
    state = trainer.model.state_dict()
    return {k: v for k, v in state.items() if k not in BEFORE_BN}, records[-1].train_loss


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("algorithm", ["centralised", "fedavg"])
def test_a_plain_loop_gives_the_same(algorithm: str, name: str) -> None:
    """Pooled gradients of three clients with one state for all rounds; one client, anew in each."""
    pooled = algorithm == "centralised"
    count = 3 if pooled else 1
    options = job(algorithm, name, clients=count, clients_per_round=None)
    options.partition = PartitionConfig(name=PartitionName.iid)
    dataset = datasets.load(options.data, options.seed)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, count, options.partition, options.seed)
    clients = [dataset.take(dataset.train[part]) for part in parts]
    model = factory.build(options.model, dataset.shape, dataset.classes, options.seed).double()
    state: dict[str, list[Tensor]] = {}
    steps = 0
    for number in (1, 2):
        if not pooled:
            state, steps = {}, 0
        sampler = BatchSampler.of(options)
        orders = [next(sampler.draw(len(c), k, number)) for k, c in enumerate(clients)]
        for step in range(3):
            batches = [c[order[step]] for c, order in zip(clients, orders, strict=True)]
            x = torch.cat([batch.inputs.double() for batch in batches])
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), torch.cat([b.labels for b in batches]))
            loss.backward()
            steps += 1
            plain_step(dict(model.named_parameters()), state, steps, options.optimizer)
    for found, _ in on_ranks(2 if pooled else 1, trained, options):
        expected = model.state_dict()
        for key, value in found.items():
            assert close(value.double(), expected[key].double()), key


@cache
def alone(algorithm: str, name: str, mu: float) -> tuple[dict[str, Tensor], float]:
    sequential = CohortConfig(mode=CohortMode.sequential)
    return trained(job(algorithm, name, cohort=sequential, client=ClientConfig(proximal_mu=mu)))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg", "centralised"])
def test_all_ways_to_run_clients_give_the_same(algorithm: str, name: str, ranks: int) -> None:
    """Stacked two at a time; taken from the stack after the synchronised steps; on two ranks.

    FedProx's term is clipped with the rest of the gradient.
    """
    mu = 0.1 if name == "clipped" else 0.0
    expected, loss = alone(algorithm, name, mu)
    stacked = CohortConfig(mode=CohortMode.stacked, max_stacked=2)
    options = job(algorithm, name, cohort=stacked, client=ClientConfig(proximal_mu=mu))
    found = on_ranks(ranks, trained, options) if ranks > 1 else [trained(options)]
    options.cohort = CohortConfig(mode=CohortMode.sequential)
    found += [trained(options, True)] if ranks == 1 else on_ranks(ranks, trained, options)
    for state, other_loss in found:
        assert distance(state, expected) < 1e-10
        assert other_loss == pytest.approx(loss, rel=1e-10)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", SETTINGS)
def test_compiled_steps_give_the_same(name: str) -> None:
    options = job("fedtan", name, clients=2, clients_per_round=None, batch_size=16)
    options.cohort = CohortConfig(mode=CohortMode.sequential)
    expected, _ = trained(options)
    options.compile = True
    assert distance(trained(options)[0], expected) < 1e-10


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optimizer_changes_what_is_trained(name: str) -> None:
    """Each of the options counts: without it the model is another one."""
    plain, _ = alone("fedtan", name, 0.0)
    o = SETTINGS[name]
    for option in ("nesterov", "betas", "decay_norm", "clip_norm", "eps"):
        if getattr(o, option) != (neutral := getattr(OptimizerConfig(), option)):
            options = job("fedtan", name, optimizer=replace(o, **{option: neutral}))
            other, _ = trained(options)
            assert distance(other, plain) > 1e-6, option


@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_gradients_and_state_that_lie_otherwise_are_taken_for_what_they_are(name: str) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(3, 4, 3, 2, 2)
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        value = torch.ones(4, 3, 2, 2).contiguous(memory_format=order).requires_grad_()
        optimizer = ClientOptimizer({"w": value}, OptimizerSettings(SETTINGS[name], 0.1))
        for gradient in gradients:
            value.grad = gradient.clone()
            optimizer.step()
            state = optimizer.state()
            optimizer.free()
            optimizer.load({"w": {key: each.contiguous() for key, each in state["w"].items()}})
        found.append(value.detach())
    assert torch.allclose(found[0], found[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_slices_and_complex_parameters_are_stepped_too(name: str) -> None:
    """The fused kernels would read what lies between the values of a slice, and refuse complex."""
    torch.manual_seed(0)
    options = replace(SETTINGS[name], clip_norm=None)
    start, gradients = torch.randn(4, 6, dtype=torch.complex64), torch.randn(3, 4, 6, 2)
    found = []
    for values in (
        [start.real.clone()[:, ::2], start.imag.clone()[:, :3]],
        [start.real[:, ::2].clone(), start.imag[:, :3].clone()],
    ):
        named = {f"{i}": nn.Parameter(each) for i, each in enumerate(values)}
        optimizer = ClientOptimizer(named, OptimizerSettings(options, 0.1))
        for gradient in gradients:
            for i, value in enumerate(named.values()):
                value.grad = gradient[:, :3, i].clone()
            optimizer.step()
        found.append(torch.stack([value.detach() for value in named.values()]))
    assert torch.allclose(found[0], found[1], rtol=1e-6)
    value = nn.Parameter(start.clone())
    value.grad = torch.ones_like(start)
    ClientOptimizer({"w": value}, OptimizerSettings(options, 0.1)).step()
    assert not torch.equal(value.detach(), start)


@pytest.mark.parametrize("name", ["adamw", "clipped"])
def test_channels_last_convolutions_train_alike_stacked_and_alone(name: str) -> None:
    """In float32, where they are channels last; a stack is not, and its state goes back."""
    options = job(
        "fedavg",
        name,
        data=DataConfig(train_samples=120, test_samples=20),
        model=ModelConfig(name=ModelName.cnn),
        partition=PartitionConfig(name=PartitionName.iid),
        batch_size=8,
    )
    options.precision = Config().precision
    options.cohort = CohortConfig(mode=CohortMode.sequential)
    expected, _ = trained(options)
    options.cohort = CohortConfig(mode=CohortMode.stacked)
    assert distance(trained(options)[0], expected) < 1e-3


def test_vectors_and_normalization_layers_are_without_decay() -> None:
    mlp = network(Config(), (1, 8, 8), 10)
    assert undecayed_names(mlp) == {
        name for name, value in mlp.named_parameters() if value.ndim == 1
    }
    deep = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]), nn.MultiheadAttention(4, 2))
    expected = {"0.bias", "1.weight", "1.bias", "2.in_proj_bias", "2.out_proj.bias"}
    assert undecayed_names(deep) == expected


def test_a_gradient_is_clipped_to_the_norm_for_each_client() -> None:
    clipped = OptimizerConfig(lr=1.0, clip_norm=2.0)
    make = partial(ClientOptimizer, settings=OptimizerSettings(clipped, 1.0))
    a, b = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, requires_grad=True)
    a.grad, b.grad = torch.tensor([[3.0, 0, 0], [0, 1, 0]]), torch.tensor([4.0, 1.0])
    make({"a": a, "b": b}, stacked=True).step()
    assert torch.allclose(-a, torch.tensor([[1.2, 0, 0], [0, 1, 0]]))
    assert torch.allclose(-b, torch.tensor([1.6, 1.0]))
    for value in (a, b):
        value.data.zero_()
    a.grad, b.grad = torch.tensor([[3.0, 0, 0], [0, 0, 0]]), torch.tensor([4.0, 0.0])
    make({"a": a, "b": b}).step()
    assert float(torch.cat([a.flatten(), b]).detach().norm()) == pytest.approx(2.0)


def test_a_checkpoint_with_the_momentum_alone_is_loaded() -> None:
    """Earlier versions kept a list of momenta, in the order of the parameters' names."""
    options = job("centralised", "nesterov", rounds=1)
    first, second = prepare(options, CPU), prepare(options, CPU)
    first.train([])
    state = first.cohort.state_dict()
    momenta = [each["momentum_buffer"] for each in state["optimizer"].values()]
    assert len(momenta) == len(list(first.model.parameters()))
    older = {"model": state["model"], "server": state["server"], "momentum": momenta}
    second.cohort.load_state_dict(older)
    found = second.cohort.state_dict()["optimizer"]
    assert found.keys() == state["optimizer"].keys()
    for name, tensors in state["optimizer"].items():
        assert torch.equal(found[name]["momentum_buffer"], tensors["momentum_buffer"])
