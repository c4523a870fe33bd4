"""Every method as a job and as its re-statement, for a few unequal clients of an mlp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from fedtan_hpc.config.enums import AlgorithmName, NormName, PartitionName, PrecisionName
from fedtan_hpc.config.schema import AlgorithmConfig, Config, OptimizerConfig, PartitionConfig
from fedtan_hpc.data import datasets, partition
from fedtan_hpc.data.batching import BatchSampler, Dataset
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.job.trainer import Trainer
from fedtan_hpc.models import factory
from fedtan_hpc.training import client_sampling
from tests.helpers import restated
from tests.helpers.restated import Method, State
from tests.helpers.rounds import CPU

AFFINE = ("2.weight", "2.bias", "5.weight", "5.bias")
RESTATED: dict[str, Callable[[int], Method]] = {
    "fedtan": lambda number: Method(synchronised=1),
    "fedavg": lambda number: Method(),
    "fedavg_gn": lambda number: Method(normaliser="groups", groups=4),
    "fedavg_ln": lambda number: Method(normaliser="groups", groups=1),
    "fedbn": lambda number: Method(private=(*AFFINE, *restated.STATISTICS)),
    "silobn": lambda number: Method(private=restated.STATISTICS),
    "fixbn": lambda number: (
        Method() if number <= 1 else Method(normaliser="frozen", unaveraged=restated.STATISTICS)
    ),
    "fbn": lambda number: Method(normaliser="fixed"),
    "hbn": lambda number: Method(normaliser="mixed", private=("mix",)),
    "centralised": lambda number: Method(synchronised=99, pooled_gradients=True),
    "singleset": lambda number: Method(private=("",)),
}


def config(method: str, **options: object) -> Config:
    """Returns a job of three rounds with three of four unequal clients and three local steps."""
    algorithm = AlgorithmConfig(name=AlgorithmName(method))
    if method == "fedavg_gn":
        algorithm.groups = 4
    defaults: dict[str, object] = {
        "algorithm": algorithm,
        "partition": PartitionConfig(name=PartitionName.dirichlet, alpha=0.5),
        "optimizer": OptimizerConfig(lr=0.05, momentum=0.9),
        "precision": PrecisionName.float64,
        "clients": 4,
        "clients_per_round": 3,
        "rounds": 3,
        "local_steps": 3,
        "batch_size": 16,
        "eval_every": 3,
        "seed": 3,
    }
    return Config(**{**defaults, **options})  # type: ignore[arg-type]


def simulated(options: Config) -> tuple[State, dict[int, State], list[float]]:
    """Returns the global values, private values by client, and training losses, re-stated."""
    dataset = datasets.load(options.data, options.seed)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, options.clients, options.partition, options.seed)
    clients = [dataset.take(dataset.train[part]) for part in parts]
    shares = [len(part) / len(labels) for part in parts]
    state = initial(options, dataset)
    own: dict[int, State] = {k: dict(state) for k in range(options.clients)}
    server = restated.Server(
        str(options.server.optimizer),
        options.server.lr or (1.0 if options.server.optimizer == "momentum" else 0.01),
    )
    pooled_velocity: State = {}
    losses = []
    for number in range(1, options.rounds + 1):
        method = RESTATED[str(options.algorithm.name)](number)
        if options.algorithm.synchronised_steps is not None:
            method.synchronised = options.algorithm.synchronised_steps
        if (number - 1) % (options.algorithm.synchronise_every or 1):
            method.synchronised = 0
        if options.model.norm is NormName.none:
            method.normaliser = "none"
        drawn = client_sampling.draw(
            shares, options.clients_per_round, options.participation, options.seed, number
        )
        p = list(drawn.values())
        states = []
        for k in drawn:
            mixed = {
                n: own[k][n] if restated.is_private(n, method) else v for n, v in state.items()
            }
            states.append(restated.client_copy(mixed))
        starts = [{n: v.detach().clone() for n, v in s.items()} for s in states]
        velocity: list[State] = [dict(pooled_velocity) for _ in states]
        orders = [
            next(
                BatchSampler(options.batch_size, options.local_steps, options.seed).draw(
                    len(clients[k].labels), k, number
                )
            )
            for k in drawn
        ]
        means = [0.0] * len(p)
        for step in range(options.local_steps):
            batches = [
                (clients[k].inputs[order[step]].double(), clients[k].labels[order[step]])
                for k, order in zip(drawn, orders, strict=True)
            ]
            step_losses = restated.local_step(
                states,
                batches,
                p,
                method,
                step < method.synchronised,
                state,
                velocity,
                options.optimizer.lr,
                options.optimizer.momentum,
                options.client.proximal_mu,
                starts,
            )
            means = [
                m + loss / options.local_steps for m, loss in zip(means, step_losses, strict=True)
            ]
        losses.append(sum(p_k * m for p_k, m in zip(p, means, strict=True)))
        if method.pooled_gradients:
            pooled_velocity = velocity[0]
        average = dict(state)
        for name in state:
            if not restated.is_private(name, method) and not name.endswith(
                tuple(method.unaveraged) or ("?",)
            ):
                terms = zip(p, states, strict=True)
                average[name] = torch.stack([p_k * s[name].detach() for p_k, s in terms]).sum(0)
        state = {
            name: value if restated.is_private(name, method) else server_value
            for (name, value), server_value in zip(
                average.items(), server.step(state, average).values(), strict=True
            )
        }
        for k, s in zip(drawn, states, strict=True):
            kept = {n: v.detach() for n, v in s.items() if restated.is_private(n, method)}
            own[k] = {**state, **kept}
    return state, own, losses


def initial(options: Config, dataset: Dataset) -> State:
    model = factory.build(options.model, dataset.shape, dataset.classes, options.seed).double()
    state = {n: v for n, v in model.state_dict().items() if v.is_floating_point()}
    if options.algorithm.name is AlgorithmName.hbn:
        state |= {f"{bn}.mix": torch.zeros_like(state[f"{bn}.weight"]) for _, bn in restated.HIDDEN}
    if RESTATED[str(options.algorithm.name)](1).normaliser == "groups":
        state = {n: v for n, v in state.items() if not n.endswith(restated.STATISTICS)}
    if options.model.norm is NormName.none:
        state = {n: v for n, v in state.items() if n[0] not in "25"}
    return state


def all_states(trainer: Trainer) -> dict[int, State]:
    """Returns the private state of each client, drawn or not."""
    states, model = trainer.cohort.states, trainer.model
    clients = range(trainer.config.clients) if states.exist else ()
    return {client: states.named(client, model) for client in clients}


def trained(options: Config) -> tuple[State, dict[int, State], list[float]]:
    """Trains with the package; returns global values, private values by client, and losses."""
    trainer = prepare(options, CPU)
    records = trainer.train([])
    own = all_states(trainer)
    return dict(trainer.model.state_dict()), own, [record.train_loss for record in records]


def times_drawn(options: Config) -> Counter[int]:
    """Returns the number of rounds in which each client takes part."""
    shares = prepare(options, CPU).store.shares
    config = (options.clients_per_round, options.participation, options.seed)
    rounds = range(1, options.rounds + 1)
    return Counter(k for n in rounds for k in client_sampling.draw(shares, *config, n))


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm().clamp_min(1e-3)) < 1e-9
