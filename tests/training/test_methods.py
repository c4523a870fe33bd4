"""Every method against its re-statement, on ranks, with clients that are not always drawn."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedtan_hpc.config.algorithms import ALGORITHMS, ParameterGroup
from fedtan_hpc.config.enums import (
    AlgorithmName,
    CohortMode,
    ModelSource,
    NormName,
    PartitionName,
    PrecisionName,
    ServerOptimizerName,
)
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CohortConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
    ServerConfig,
)
from fedtan_hpc.data import batching, datasets, partition
from fedtan_hpc.distributed import process_group
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.job.trainer import Trainer
from fedtan_hpc.models import factory
from fedtan_hpc.models.parameter_groups import groups_of
from fedtan_hpc.runtime.device import DevicePlacement
from fedtan_hpc.training import client_sampling
from fedtan_hpc.training.client_state import PrivateStates
from tests.helpers import restated
from tests.helpers.ranks import on_ranks
from tests.helpers.restated import Method, State

CPU = DevicePlacement(torch.device("cpu"), "gloo")
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
    """Four unequal clients, three of them in each of three rounds of three steps."""
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
    """Global values, private values by client, and training losses."""
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
            states.append(restated.own_copy(mixed))
        starts = [{n: v.detach().clone() for n, v in s.items()} for s in states]
        velocity: list[State] = [dict(pooled_velocity) for _ in states]
        orders = [
            batching.batch_indices(
                len(clients[k].labels),
                options.batch_size,
                options.local_steps,
                options.seed,
                k,
                number,
            )
            for k in drawn
        ]
        means = [0.0] * len(p)
        for step in range(options.local_steps):
            batches = [
                (clients[k].inputs[order[step]].double(), clients[k].labels[order[step]])
                for k, order in zip(drawn, orders, strict=True)
            ]
            now = restated.local_step(
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
            means = [m + loss / options.local_steps for m, loss in zip(means, now, strict=True)]
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


def initial(options: Config, dataset: datasets.Dataset) -> State:
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
    """What each client keeps, those that were never drawn too."""
    states, model = trainer.cohort.states, trainer.model
    clients = range(trainer.config.clients) if states.exist else ()
    return {client: states.named(client, model) for client in clients}


def trained(options: Config) -> tuple[State, dict[int, State], list[float]]:
    """The same from the product."""
    trainer = prepare(options, CPU)
    records = trainer.train([])
    own = all_states(trainer)
    return dict(trainer.model.state_dict()), own, [record.train_loss for record in records]


def compare(options: Config, ranks: int) -> None:
    expected, own, losses = simulated(options)
    times = times_drawn(options)
    for state, kept, train_losses in on_ranks(ranks, trained, options):
        for name, value in expected.items():
            assert close(state[name], value), name
        assert train_losses == pytest.approx(losses, rel=1e-10)
        for client, values in kept.items():
            for name, value in values.items():
                if name in own[client]:
                    assert close(value, own[client][name]), (client, name)
                else:
                    assert name.endswith("num_batches_tracked")
                    assert int(value) == options.local_steps * times[client]


def times_drawn(options: Config) -> Counter[int]:
    """Rounds in which each client takes part."""
    shares = prepare(options, CPU).store.shares
    config = (options.clients_per_round, options.participation, options.seed)
    rounds = range(1, options.rounds + 1)
    return Counter(k for n in rounds for k in client_sampling.draw(shares, *config, n))


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm().clamp_min(1e-3)) < 1e-9


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", RESTATED)
def test_a_method_does_what_its_definition_says(method: str, ranks: int) -> None:
    compare(config(method), ranks)


def test_every_method_is_restated() -> None:
    assert set(RESTATED) == {str(name) for name in ALGORITHMS} == {str(n) for n in AlgorithmName}


@pytest.mark.parametrize("mode", [CohortMode.stacked, CohortMode.sequential])
@pytest.mark.parametrize("method", [m for m in RESTATED if m not in ("fbn", "hbn")])
def test_stacked_clients_do_the_same(method: str, mode: CohortMode) -> None:
    compare(config(method, cohort=CohortConfig(mode=mode, max_stacked=2)), 1)


OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "all steps synchronised": ("fedtan", {"algorithm.synchronised_steps": 3}),
    "none synchronised": ("fedtan", {"algorithm.synchronised_steps": 0}),
    "every second round": ("fedtan", {"algorithm.synchronise_every": 2}),
    "proximal": ("fedavg", {"client.proximal_mu": 0.5}),
    "proximal, private": ("fedbn", {"client.proximal_mu": 0.5}),
    "momentum": ("fedtan", {"server.optimizer": "momentum"}),
    "adam": ("fedavg", {"server.optimizer": "adam"}),
    "yogi": ("fedavg", {"server.optimizer": "yogi", "server.lr": 0.05}),
    "adam, private": ("silobn", {"server.optimizer": "adam"}),
    "adam, private mixing": ("hbn", {"server.optimizer": "adam"}),
    "momentum, frozen": ("fixbn", {"server.optimizer": "momentum"}),
    "no normalization": ("fedavg", {"model.norm": "none"}),
    "centralised, no normalization": ("centralised", {"model.norm": "none"}),
}


@pytest.mark.parametrize(
    ("case", "stacked"),
    [
        (case, stacked)
        for case in OPTIONS
        for stacked in (False, True)
        if not (stacked and "mixing" in case)
    ],
)
def test_options_combine_with_methods(case: str, stacked: bool) -> None:
    method, changes = OPTIONS[case]
    options = config(method)
    for option, value in changes.items():
        group, _, name = option.partition(".")
        kinds: dict[str, Callable[[object], object]] = {
            "server.optimizer": ServerOptimizerName,
            "model.norm": NormName,
        }
        setattr(getattr(options, group), name, kinds.get(option, type(value))(value))
    if stacked:
        options.cohort = CohortConfig(mode=CohortMode.stacked)
    compare(options, 1 if stacked else 2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_centralised_is_sgd_on_the_pooled_batches(momentum: float) -> None:
    """Equal clients; torch's own BN and one SGD for all rounds, on the batches side by side."""
    options = config(
        "centralised",
        partition=PartitionConfig(name=PartitionName.iid),
        optimizer=OptimizerConfig(lr=0.05, momentum=momentum, weight_decay=1e-3),
        clients=3,
        clients_per_round=None,
    )
    dataset = datasets.load(options.data, options.seed)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, 3, options.partition, options.seed)
    clients = [dataset.take(dataset.train[part]) for part in parts]
    model = factory.build(options.model, dataset.shape, dataset.classes, options.seed).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=1e-3)
    for number in (1, 2, 3):
        orders = [
            batching.batch_indices(len(c), 16, 3, options.seed, k, number)
            for k, c in enumerate(clients)
        ]
        for step in range(3):
            batches = [c[order[step]] for c, order in zip(clients, orders, strict=True)]
            x = torch.cat([batch.inputs.double() for batch in batches])
            y = torch.cat([batch.labels for batch in batches])
            sgd.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            sgd.step()
    for state, _, _ in on_ranks(2, trained, options):
        for name, value in model.state_dict().items():
            assert close(state[name].double(), value.double()), name


def states_by_round(
    options: Config,
) -> list[tuple[list[int], dict[int, State], State, list[int | None]]]:
    """After each round: who was drawn, all private states, the global model, and the owners."""
    trainer = prepare(options, CPU)
    states = trainer.cohort.states
    found = []
    for number in range(1, options.rounds + 1):
        trainer.round(number)
        drawn = list(trainer._participants(number))
        own = all_states(trainer)
        owners = [states.owner(client) for client in range(options.clients)]
        found.append((drawn, own, copy.deepcopy(trainer.model.state_dict()), owners))
    return found


@pytest.mark.parametrize("method", ["fedbn", "silobn", "hbn", "singleset"])
def test_what_is_private_stays_private_and_what_is_shared_is_equal(method: str) -> None:
    options = config(method, rounds=6, clients=5, clients_per_round=2, local_steps=1)
    private = ALGORITHMS[options.algorithm.name].private
    ranks = on_ranks(2, states_by_round, options)
    parts = groups_of(prepare(options, CPU).model)
    owners = set()
    for number, (drawn, own, shared, where) in enumerate(ranks[0]):
        assert all(parts[name] in private for values in own.values() for name in values)
        owners.add(where[drawn[0]])
        for name, value in ranks[1][number][2].items():
            assert torch.equal(value, shared[name])
            if parts[name] in private:
                assert torch.equal(value, ranks[0][0][2][name])
        if number:
            for client, values in own.items():
                same = [
                    torch.equal(v, ranks[0][number - 1][1][client][n]) for n, v in values.items()
                ]
                assert all(same) if client not in drawn else not all(same)
    moved = [
        client
        for client in range(5)
        if len({rounds[3][client] for rounds in ranks[0]} - {None}) > 1
    ]
    assert moved, "no client's state went to another rank"


def test_states_that_do_not_fit_on_the_device_are_kept_on_the_host() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    asked = []

    def fits(more: int) -> bool:
        asked.append(more)
        return False

    states = PrivateStates(model, {ParameterGroup.statistics}, fits)
    states.save(0, model)
    assert asked == []  # on a CPU there is nothing to choose

    class OnGpu(Tensor):
        is_cuda = True

        def cpu(self, *_: object) -> Tensor:
            return torch.zeros(7)

    states._keep(1, torch.ones(7).as_subclass(OnGpu))
    assert asked == [28]
    states.load(1, model)
    running_mean = model[1].running_mean
    assert isinstance(running_mean, Tensor)
    assert running_mean.tolist() == [0.0, 0.0, 0.0]


def shrinking(rounds: int) -> list[tuple[Tensor, Tensor]]:
    """Running variance after each round, and the plain average that the server was given."""
    from fedtan_hpc import convert_batchnorm
    from fedtan_hpc.config.algorithms import plan
    from fedtan_hpc.data.batching import Samples
    from fedtan_hpc.data.client_store import Client
    from fedtan_hpc.job.setup import host
    from fedtan_hpc.training.local_training import RoundContext

    torch.manual_seed(0)
    bn = nn.BatchNorm1d(5)
    model = convert_batchnorm(nn.Sequential(nn.Linear(6, 5), bn, nn.Linear(5, 3)))
    options = config("fedavg", server=ServerConfig(optimizer=ServerOptimizerName.momentum))
    options.precision, options.local_steps = PrecisionName.float32, 20
    samples = Samples(0.01 * torch.randn(64, 6), torch.randint(0, 3, (64,)))
    cohort = host(options, model, samples[:1])
    found = []
    variance = bn.running_var
    assert variance is not None
    for number in range(1, rounds + 1):
        before = variance.clone()
        cohort.train([Client(0, 1.0, samples)], RoundContext(number, 0.01, plan(options, number)))
        found.append((before, variance.clone()))
    return found


def test_server_momentum_leaves_variances_positive() -> None:
    """Variances fall from 1 to 1e-4; momentum applied to them too overshoots below 0."""
    rounds = shrinking(4)
    naive, change = rounds[0][0].clone(), torch.zeros(5)
    lowest = naive.min()
    for _, average in rounds:
        change = 0.9 * change + (average - naive)
        naive = naive + change
        lowest = torch.minimum(lowest, naive.min())
    assert lowest < 0
    assert all(float(after.min()) > 0 for _, after in rounds)


def test_a_round_of_one_step_of_fedtan_is_one_of_centralised() -> None:
    """E = 1: the same model but for rounding, however the data are split."""
    options = config(
        "fedtan", local_steps=1, optimizer=OptimizerConfig(lr=0.1), clients_per_round=None
    )
    [fedtan, *_] = on_ranks(2, trained, options)
    options.algorithm = AlgorithmConfig(name=AlgorithmName.centralised)
    [centralised, *_] = on_ranks(2, trained, options)
    for name, value in centralised[0].items():
        assert close(fedtan[0][name].double(), value.double()), name


def messages(options: Config) -> list[tuple[int, int]]:
    records = prepare(options, CPU).train([])
    sent = [(record.comm_messages, record.comm_bytes) for record in records]
    payload = [(record.payload_messages, record.payload_bytes) for record in records]
    assert sent == (payload if process_group.is_started() else [(0, 0)] * len(records))
    return payload


def test_messages_of_the_methods() -> None:
    """Two BN layers, three steps; floats of the mlp: 17,610 trainable, 384 statistics."""
    trainable, running, header = 17_610, 384 + 2, 2
    sizes = {
        "fedavg": (1, trainable + running + header),
        "fedavg_gn": (1, trainable + header),
        "fedbn": (1, trainable - 384 + header),
        "silobn": (1, trainable + header),
        "singleset": (0, 0),
        "hbn": (1, trainable + running + header),
    }
    for method, (count, floats) in sizes.items():
        options = config(method, rounds=1, clients_per_round=None)
        for [(number, payload)] in on_ranks(2, messages, options):
            assert (number, payload) == (count, 8 * floats), method
        assert messages(options) == [(count, 8 * floats)]
    [frozen, *_] = on_ranks(2, messages, config("fixbn", rounds=2, clients_per_round=None))
    assert frozen == [(1, 8 * (trainable + running + header)), (1, 8 * (trainable + header))]
    [centralised, *_] = on_ranks(2, messages, config("centralised", rounds=1))
    assert centralised[0][0] == 3 * (4 + 1) + 1
    assert process_group.world_size() == 1


ODD = {
    "frozen": ["fedtan", "fedavg", "fedbn", "centralised"],
    "unused": ["fedtan", "fedavg", "centralised"],
    "cumulative": ["fedtan", "silobn", "fedbn", "singleset"],
    "counting": ["fedtan", "fixbn", "silobn"],
    "spectral": ["fedtan", "fixbn"],
}
"""Networks that are not like others, and the methods that they could trouble."""


@pytest.mark.parametrize(("network", "method"), [(n, m) for n in ODD for m in ODD[n]])
def test_odd_networks_train_alike_in_every_way(network: str, method: str) -> None:
    """In lock-step, stacked, and on two ranks; a frozen parameter stays what it was."""
    options = config(
        method,
        model=ModelConfig(source=ModelSource.target, target=f"tests.helpers.networks:{network}"),
        optimizer=OptimizerConfig(lr=0.05, momentum=0.9, weight_decay=0.01),
        cohort=CohortConfig(mode=CohortMode.sequential),
        rounds=4,
    )
    state, own, losses = trained(options)
    others = on_ranks(2, trained, options)
    if network not in ("counting", "spectral"):  # which update buffers in place
        options.cohort.mode = CohortMode.stacked
        others.append(trained(options))
    for other, of_clients, other_losses in others:
        assert other_losses == pytest.approx(losses, rel=1e-9)
        for name, value in state.items():
            assert close(other[name].double(), value.double()), name
        for client, values in own.items():
            for name, value in values.items():
                assert close(of_clients[client][name].double(), value.double()), (client, name)
    if network == "frozen":
        before = prepare(options, CPU).model.state_dict()
        assert torch.equal(state["1.weight"], before["1.weight"])


def test_moving_states_are_no_payload() -> None:
    """fedbn sends the same on one rank and on two, but for states that go with their clients."""
    options = config("fedbn", rounds=5, clients=6)
    alone = messages(options)
    records = on_ranks(2, payloads, options)
    assert [payload for payload, _ in records[0]] == [payload for _, payload in alone]
    assert any(sent > payload for payload, sent in records[0])


def payloads(options: Config) -> list[tuple[int, int]]:
    records = prepare(options, CPU).train([])
    return [(record.payload_bytes, record.comm_bytes) for record in records]
