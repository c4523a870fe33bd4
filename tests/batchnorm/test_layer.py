"""The converted layer: as torch's own outside the context, global over the ranks inside it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from fedtan_hpc import FedTANBatchNorm, convert_batchnorm, federated_statistics
from fedtan_hpc.distributed.counters import training_traffic
from tests.helpers import networks, pooled
from tests.helpers.ranks import RankFailed, on_ranks

Values = dict[str, Tensor]

SHAPES: dict[type[_BatchNorm], tuple[int, ...]] = {
    nn.BatchNorm1d: (6, 4, 5),
    nn.BatchNorm2d: (5, 4, 3, 3),
    nn.BatchNorm3d: (4, 4, 2, 3, 2),
    nn.SyncBatchNorm: (5, 4, 3, 3),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "eps and momentum": {"eps": 1e-3, "momentum": 0.3},
    "momentum None": {"momentum": None},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "meta device": {"device": "meta"},
}
SETTINGS = ["training", "eps", "momentum", "affine", "track_running_stats", "num_features"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(layer: _BatchNorm) -> _BatchNorm:
    """Parameters that are neither 0 nor 1."""
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(randn(layer.num_features, seed=7).abs() + 0.5)
            layer.bias.copy_(randn(layer.num_features, seed=8))
    return layer


def run_layer(layer: nn.Module, x: Tensor, g: Tensor) -> Values:
    """Output, derivatives for the loss sum(y g), and buffers after one use of ``layer``."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    parameters = dict(layer.named_parameters())
    y = layer(x)
    dx, *derivatives = torch.autograd.grad((y * g).sum(), [x, *parameters.values()])
    values = {"y": y.detach(), "dx": dx, **dict(layer.named_buffers())}
    for name, derivative in zip(parameters, derivatives, strict=True):
        values[f"d {name}"] = derivative
    return {name: value.clone() for name, value in values.items()}


def gradients(module: nn.Module) -> Values:
    return {f"d {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_same_bits(measured: Values, expected: Values) -> None:
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name].dtype == value.dtype, name
        assert torch.equal(measured[name], value), name


def assert_close(measured: Values, expected: Values, bound: float) -> None:
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        error = (measured[name].double() - value.double()).norm()
        assert error <= bound * value.double().norm(), (name, float(error))


# Conversion


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_parameters_buffers_and_settings(
    kind: type[_BatchNorm], options: str, training: bool
) -> None:
    layer = kind(4, **OPTIONS[options]).train(training)
    expected = dict(layer.named_parameters()) | dict(layer.named_buffers())
    keys = list(layer.state_dict())
    converted = convert_batchnorm(nn.Sequential(layer))[0]  # type: ignore[index]
    assert type(converted) is FedTANBatchNorm
    found = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert found.keys() == expected.keys()
    assert all(found[name] is value for name, value in expected.items())
    assert list(converted.state_dict()) == keys
    assert all(getattr(converted, name) == getattr(layer, name) for name in SETTINGS)


def test_a_converted_layer_has_the_dtype_and_device_asked_for() -> None:
    half = convert_batchnorm(nn.BatchNorm1d(3, dtype=torch.bfloat16))
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    absent = convert_batchnorm(nn.BatchNorm1d(3, device="meta"))
    assert {value.device.type for value in absent.state_dict().values()} == {"meta"}


def test_a_module_keeps_its_state_dict_keys_and_parameter_order() -> None:
    module = networks.network("2d")
    names, parameters = list(module.state_dict()), list(module.parameters())
    assert convert_batchnorm(module) is module
    assert list(module.state_dict()) == names
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))


def test_a_layer_in_two_places_stays_one_layer() -> None:
    layer = nn.BatchNorm1d(3)
    module = convert_batchnorm(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert isinstance(module.get_submodule("a"), FedTANBatchNorm)
    assert module.get_submodule("a") is module.get_submodule("b.0")


def test_a_root_that_is_a_layer_comes_back_converted() -> None:
    layer = nn.BatchNorm2d(3)
    converted = convert_batchnorm(layer)
    assert type(converted) is FedTANBatchNorm
    assert converted.weight is layer.weight


def test_an_absent_child_is_left_absent() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3))
    module.register_module("nothing", None)
    assert convert_batchnorm(module)._modules["nothing"] is None


def test_hooks_survive_the_conversion() -> None:
    layer, calls = nn.BatchNorm1d(3), list[str]()
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    removable = layer.register_forward_hook(lambda *_: calls.append("removed"))
    module = convert_batchnorm(nn.Sequential(nn.Linear(2, 3), layer))
    removable.remove()
    module(torch.randn(4, 2)).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_converting_twice_is_converting_once() -> None:
    module = convert_batchnorm(networks.network("shared"))
    before = list(module.modules())
    after = list(convert_batchnorm(module).modules())
    assert all(a is b for a, b in zip(after, before, strict=True))


class OwnBatchNorm(nn.BatchNorm1d):
    """A subclass, which might do anything."""


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm1d(), nn.LazyBatchNorm2d(), OwnBatchNorm(3)])
def test_other_kinds_of_layer_are_refused_by_name(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Sequential(layer))
    with pytest.raises(ValueError, match=rf"layer 1\.0 is a {type(layer).__name__}"):
        convert_batchnorm(module)
    with pytest.raises(ValueError, match=r"layer \(root\)"):
        convert_batchnorm(layer)


def two_uses(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[Values]:
    """A use in training and one in evaluation mode."""
    found = []
    for training in (True, False):
        layer.train(training)
        x, g = (randn(*shape, seed=training + seed).to(dtype) for seed in (1, 5))
        found.append(run_layer(layer, x, g))
    return found


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "meta device"])
@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind is not nn.SyncBatchNorm])
def test_outside_the_context_the_layer_is_torchs_to_the_bit(
    kind: type[_BatchNorm], options: str
) -> None:
    original = fill(kind(4, **OPTIONS[options]))
    converted = convert_batchnorm(copy.deepcopy(original))
    dtype = OPTIONS[options].get("dtype", torch.float32)
    expected = two_uses(original, SHAPES[kind], dtype)
    for measured, value in zip(two_uses(converted, SHAPES[kind], dtype), expected, strict=True):
        assert_same_bits(measured, value)


@pytest.mark.parametrize("options", ["defaults", "no running statistics"])
def test_in_evaluation_mode_the_context_changes_no_bit(options: str) -> None:
    original = fill(nn.BatchNorm1d(4, **OPTIONS[options])).eval()
    converted = convert_batchnorm(copy.deepcopy(original))
    x, g = randn(6, 4).float(), randn(6, 4, seed=1).float()
    with federated_statistics(converted, weight=1.0):
        measured = run_layer(converted, x, g)
    assert_same_bits(measured, run_layer(original, x, g))


def test_an_input_of_another_width_is_refused() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(4))
    with (
        federated_statistics(layer, weight=1.0),
        pytest.raises(ValueError, match="expected 4 channels"),
    ):
        layer(torch.randn(6, 3))


# One client


def network_gradients(module: nn.Module, case: str) -> Values:
    x, y = networks.batches(case, 1)[0]
    cross_entropy(module(x), y).backward()
    return gradients(module)


@pytest.mark.parametrize("case", networks.CASES)
def test_one_client_alone_is_local_batchnorm(case: str) -> None:
    expected = network_gradients(networks.network(case), case)
    module = convert_batchnorm(networks.network(case))
    with federated_statistics(module, weight=1.0):
        measured = network_gradients(module, case)
    assert pooled.worst_relative_error(measured, expected) < 1e-12


@pytest.mark.parametrize("weight", [0.5, 0.0, -1.0, 2.0, float("nan")])
def test_one_client_alone_has_weight_1(weight: float) -> None:
    module = convert_batchnorm(networks.network("shared"))
    with federated_statistics(module, weight), pytest.raises(ValueError, match="layer bn"):
        module(networks.batches("shared", 1)[0][0])


def test_an_unconverted_layer_is_refused_by_name() -> None:
    module = nn.Sequential(convert_batchnorm(nn.BatchNorm1d(3)), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="layer 1 is local"), federated_statistics(module, 1.0):
        pass
    assert is_local(module[0])


def is_local(layer: nn.Module) -> bool:
    """Whether ``layer`` agrees with torch's BN; in a context of weight 0.5 it would raise."""
    x = randn(6, 3).float()
    return torch.equal(layer(x), nn.BatchNorm1d(3)(x))


def test_after_the_context_the_layer_is_local_again() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with federated_statistics(layer, weight=0.5):
        assert raises_value_error(layer)
    assert is_local(layer)


def test_after_an_exception_the_layer_is_local_again() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with pytest.raises(KeyError), federated_statistics(layer, weight=0.5):
        raise KeyError
    assert is_local(layer)


def raises_value_error(layer: nn.Module) -> bool:
    try:
        layer(torch.randn(6, 3))
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("fails", [False, True])
def test_an_inner_context_gives_the_outer_one_back(fails: bool) -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with federated_statistics(layer, weight=0.5):
        try:
            with federated_statistics(layer, weight=1.0):
                layer(torch.randn(6, 3))
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert raises_value_error(layer)
    assert is_local(layer)


def test_the_backward_pass_may_follow_the_context() -> None:
    expected = network_gradients(networks.network("1d"), "1d")
    module = convert_batchnorm(networks.network("1d"))
    x, y = networks.batches("1d", 1)[0]
    with federated_statistics(module, weight=1.0):
        loss = cross_entropy(module(x), y)
    loss.backward()
    assert pooled.worst_relative_error(gradients(module), expected) < 1e-12


class NoGradient(torch.autograd.Function):
    """The identity, through which nothing flows back, not even zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None


def test_an_undefined_gradient_counts_as_zero() -> None:
    x = randn(6, 3).requires_grad_()
    layer = convert_batchnorm(nn.BatchNorm1d(3).double())
    with federated_statistics(layer, weight=1.0):
        NoGradient.apply(layer(x)).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None or x.grad.count_nonzero() == 0


# Several clients: one layer against pooled autograd


GLOBAL_SHAPES = {"(N, C)": (3,), "(N, C, L)": (3, 7), "(N, C, H, W)": (3, 4, 5)}


def client_data(
    shape: tuple[int, ...], clients: int, sizes: tuple[int, ...] = (5, 8, 2, 6)
) -> list[tuple[Tensor, Tensor]]:
    """Inputs and upstream gradients, of another size, mean and spread on each client."""
    return [
        (
            randn(sizes[k], *shape, seed=10 + k) * (1 + 0.4 * k) + k,
            randn(sizes[k], *shape, seed=20 + k),
        )
        for k in range(clients)
    ]


def uses_on_this_rank(p: list[float]) -> dict[str, Values]:
    """One global use of a layer on this rank's data, for every shape."""
    rank = dist.get_rank()
    found = {}
    for name, shape in GLOBAL_SHAPES.items():
        layer = convert_batchnorm(fill(nn.SyncBatchNorm(shape[0])).double())
        with federated_statistics(layer, p[rank]):
            found[name] = run_layer(layer, *client_data(shape, len(p))[rank])
    return found


@cache
def uses_by_rank(clients: int) -> list[dict[str, Values]]:
    return on_ranks(clients, uses_on_this_rank, networks.weights(clients))


def layer_of_all_clients(data: list[tuple[Tensor, Tensor]], p: list[float]) -> list[Values]:
    """What each client should find, from one pooled problem sum_k p_k F_k in float64."""
    sizes = [len(x) for x, _ in data]
    original = fill(nn.BatchNorm1d(data[0][0].size(1))).double()
    layer = pooled.PooledBatchNorm(original, sizes, p)
    xs = [x.clone().requires_grad_() for x, _ in data]
    ys = layer(torch.cat(xs)).split(sizes)
    losses = [(y * g).sum() for y, (_, g) in zip(ys, data, strict=True)]
    total = torch.stack([w * loss for w, loss in zip(p, losses, strict=True)]).sum()
    dxs = torch.autograd.grad(total, xs, retain_graph=True)
    found = []
    for y, w, dx, loss in zip(ys, p, dxs, losses, strict=True):
        gamma, beta = torch.autograd.grad(loss, [original.weight, original.bias], retain_graph=True)
        found.append({"y": y.detach(), "dx": dx / w, "d weight": gamma, "d bias": beta})
    return found


@pytest.mark.parametrize("shape", GLOBAL_SHAPES)
@pytest.mark.parametrize("clients", [2, 3])
def test_output_and_all_derivatives_are_those_of_the_pooled_problem(
    shape: str, clients: int
) -> None:
    data = client_data(GLOBAL_SHAPES[shape], clients)
    expected = layer_of_all_clients(data, networks.weights(clients))
    for found, truth in zip(uses_by_rank(clients), expected, strict=True):
        assert_close({name: found[shape][name] for name in truth}, truth, 1e-10)


# Weights and batches


BAD: dict[str, tuple[list[float], list[int], str]] = {
    "negative": ([-0.5, 1.5], [5, 8], "1 weights on 2 ranks are negative or not finite"),
    "NaN": ([float("nan"), 1.0], [5, 8], "1 weights on 2 ranks are negative or not finite"),
    "infinite": ([1.0, float("inf")], [5, 8], "1 weights on 2 ranks are negative or not finite"),
    "more than 1": ([0.5, 0.6], [5, 8], "the weights sum to 1.1 "),
    "all zero": ([0.0, 0.0], [5, 8], "the weights sum to 0 "),
    "beyond float32": ([1e300, 0.5], [5, 8], "the weights sum to "),
    "one value": ([1.0, 0.0], [1, 6], "one value per channel on all ranks together"),
    "negative of three": ([0.4, -0.2, 0.8], [5, 8, 3], "1 weights on 3 ranks"),
    "two of three": ([0.3, -1.0, float("nan")], [5, 8, 3], "2 weights on 3 ranks"),
    "less than 1": ([0.3, 0.3, 0.3], [5, 8, 3], "the weights sum to 0.9 "),
    "empty": ([0.3, 0.3, 0.4], [5, 0, 4], "1 batches are empty, with a weight above 0"),
}


def messages_of_errors() -> dict[str, str | None]:
    """What the ValueError of each bad case for so many ranks says on this one; None without."""
    rank, found = dist.get_rank(), {}
    for name, (p, sizes, _) in BAD.items():
        if len(p) == dist.get_world_size():
            found[name] = message_of_error(p[rank], sizes[rank])
    return found


def message_of_error(weight: float, size: int) -> str | None:
    module = convert_batchnorm(networks.network("shared"))
    with federated_statistics(module, weight):
        try:
            module(randn(size, 6))
        except ValueError as error:
            return str(error)
    return None


@cache
def messages_by_rank(clients: int) -> list[dict[str, str | None]]:
    return on_ranks(clients, messages_of_errors)


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_and_batches_raise_on_every_rank_and_name_the_layer(name: str) -> None:
    p, _, reason = BAD[name]
    for messages in messages_by_rank(len(p)):
        assert (messages[name] or "no error").startswith(f"layer bn: {reason}")


WEIGHTLESS = {
    "NaN": torch.full((4, 6), torch.nan, dtype=torch.float64),
    "infinite": torch.full((4, 6), torch.inf, dtype=torch.float64),
    "empty": torch.zeros(0, 6, dtype=torch.float64),
    "one sample": randn(1, 6, seed=3),
}
COUNTING = [randn(5, 6, seed=1), randn(7, 6, seed=2) + 1]


def two_steps(weight: float, x: Tensor) -> Values:
    """Output, gradients and buffers on this rank after two forward and one backward pass."""
    module = convert_batchnorm(networks.network("1d"))
    with federated_statistics(module, weight):
        module(x)
        y = module(x)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), **gradients(module), **dict(module.named_buffers())}


def steps_of_counting_ranks() -> Values:
    rank = dist.get_rank()
    return two_steps((0.4, 0.6)[rank], COUNTING[rank])


def steps_beside_a_weightless_rank() -> dict[str, Values]:
    """The same with rank 1 put between the two, for each batch that it may hold."""
    rank = dist.get_rank()
    return {
        name: two_steps((0.4, 0.0, 0.6)[rank], (COUNTING[0], batch, COUNTING[1])[rank])
        for name, batch in WEIGHTLESS.items()
    }


@cache
def steps_by_rank() -> tuple[list[Values], list[dict[str, Values]]]:
    return on_ranks(2, steps_of_counting_ranks), on_ranks(3, steps_beside_a_weightless_rank)


@pytest.mark.parametrize("batch", WEIGHTLESS)
def test_a_rank_without_weight_changes_nothing_for_the_others(batch: str) -> None:
    expected, by_rank = steps_by_rank()
    first, weightless, second = (found[batch] for found in by_rank)
    assert_close(first, expected[0], 1e-12)
    assert_close(second, expected[1], 1e-12)
    for name in first:
        if "running" in name:
            assert torch.equal(weightless[name], first[name])


# Running statistics


OLD = {"running_mean": randn(3, seed=31), "running_var": randn(3, seed=32).abs() + 1}
RUNNING_WEIGHTS = [[0.5, 0.5, 0.0], [0.2, 0.5, 0.3]]
THREE_CALLS = [[randn(n, 3, seed=40 + s + n) + s for n in (4, 6, 3)] for s in range(3)]


def buffers_after(momentum: float | None, weight: float, xs: list[Tensor]) -> Values:
    """This rank's buffers after one global use for each of ``xs``."""
    layer = convert_batchnorm(nn.SyncBatchNorm(3, momentum=momentum).double())
    layer.load_state_dict(OLD, strict=False)
    with federated_statistics(layer, weight):
        for x in xs:
            layer(x)
    return {name: value.clone() for name, value in layer.named_buffers()}


def buffers_on_this_rank() -> dict[str, Values]:
    """Buffers after one call by case, and after three calls without momentum."""
    rank = dist.get_rank()
    found = {
        f"{shape} {p}": buffers_after(0.1, p[rank], [client_data(GLOBAL_SHAPES[shape], 3)[rank][0]])
        for shape in GLOBAL_SHAPES
        for p in RUNNING_WEIGHTS
    }
    calls = [xs[rank] for xs in THREE_CALLS]
    return found | {"three calls": buffers_after(None, RUNNING_WEIGHTS[0][rank], calls)}


@cache
def buffers_by_rank() -> list[dict[str, Values]]:
    return on_ranks(3, buffers_on_this_rank)


def the_same_bits_everywhere(case: str) -> Values:
    """The case's buffers, which all ranks have alike."""
    measured = [found[case] for found in buffers_by_rank()]
    for other in measured[1:]:
        assert_same_bits(other, measured[0])
    return measured[0]


def global_moments(p: list[float], xs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, by two passes over the clients that count."""
    dims = [dim for dim in range(xs[0].dim()) if dim != 1]
    terms = [(w, x) for w, x in zip(p, xs, strict=True) if w]
    mean = torch.stack([w * x.mean(dims, keepdim=True) for w, x in terms]).sum(0)
    variance = torch.stack([w * (x - mean).square().mean(dims) for w, x in terms]).sum(0)
    n = sum(x.numel() // x.size(1) for _, x in terms)
    return mean.flatten(), variance * n / (n - 1)


@pytest.mark.parametrize("p", RUNNING_WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", GLOBAL_SHAPES)
def test_running_statistics_move_towards_the_global_ones(shape: str, p: list[float]) -> None:
    mean, variance = global_moments(p, [x for x, _ in client_data(GLOBAL_SHAPES[shape], 3)])
    expected = {
        "running_mean": 0.9 * OLD["running_mean"] + 0.1 * mean,
        "running_var": 0.9 * OLD["running_var"] + 0.1 * variance,
        "num_batches_tracked": torch.tensor(1),
    }
    assert_close(the_same_bits_everywhere(f"{shape} {p}"), expected, 1e-14)


def test_without_momentum_running_statistics_are_means_over_the_calls() -> None:
    moments = [global_moments(RUNNING_WEIGHTS[0], xs) for xs in THREE_CALLS]
    means, variances = zip(*moments, strict=True)
    expected = {
        "running_mean": torch.stack(means).mean(0),
        "running_var": torch.stack(variances).mean(0),
        "num_batches_tracked": torch.tensor(3),
    }
    assert_close(the_same_bits_everywhere("three calls"), expected, 1e-14)


# Messages


WIDTHS = {
    "1d": [5, 4],
    "shared": [5, 5],
    "branches": [4, 4],
    "3d": [4, 5],
    "not affine": [5, 4],
    "no running statistics": [5, 4],
}


def traffic_of_one_step(case: str) -> list[tuple[int, int]]:
    """Messages and bytes of the forward and of the backward pass."""
    rank, clients = dist.get_rank(), dist.get_world_size()
    x, y = networks.batches(case, clients)[rank]
    module = convert_batchnorm(networks.network(case))
    found = []
    with federated_statistics(module, networks.weights(clients)[rank]):
        before = training_traffic.copy()
        loss = cross_entropy(module(x), y)
        found.append(training_traffic.since(before))
        before = training_traffic.copy()
        loss.backward()
        found.append(training_traffic.since(before))
    cross_entropy(module(x), y).backward()
    assert training_traffic.since(before) == found[1]
    return [(traffic.messages, traffic.bytes) for traffic in found]


def traffic_on_this_rank() -> dict[str, list[tuple[int, int]]]:
    return {case: traffic_of_one_step(case) for case in WIDTHS}


@cache
def traffic_by_rank(clients: int) -> list[dict[str, list[tuple[int, int]]]]:
    return on_ranks(clients, traffic_on_this_rank)


@pytest.mark.parametrize("case", WIDTHS)
@pytest.mark.parametrize("clients", [2, 3])
def test_each_use_of_a_layer_costs_one_message_forward_and_one_backward(
    case: str, clients: int
) -> None:
    forward = len(WIDTHS[case]), sum(8 * (7 + 4 * width) for width in WIDTHS[case])
    backward = len(WIDTHS[case]), sum(8 * (2 + 2 * width) for width in WIDTHS[case])
    for measured in traffic_by_rank(clients):
        assert measured[case] == [forward, backward]


def step_in_a_group_of_two(data: list[tuple[Tensor, Tensor]]) -> Values:
    """Ranks 0 and 2 normalise together, ranks 1 and 3 too; ranks take ``data`` in rank order."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    layer = convert_batchnorm(fill(nn.BatchNorm1d(3)).double())
    with federated_statistics(layer, (0.25, 0.75)[rank // 2], group=groups[rank % 2]):
        return run_layer(layer, *data[rank])


def test_groups_of_ranks_are_independent() -> None:
    data = client_data((3,), 4)
    measured = on_ranks(4, step_in_a_group_of_two, data)
    for first in (0, 1):
        pair = [first, first + 2]
        expected = layer_of_all_clients([data[k] for k in pair], [0.25, 0.75])
        for k, truth in zip(pair, expected, strict=True):
            assert_close({name: measured[k][name] for name in truth}, truth, 1e-12)


# Element types and memory formats


ELEMENTS = {
    "bfloat16 in a float32 layer": (torch.bfloat16, torch.float32),
    "float16 in a float32 layer": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32": (torch.float32, torch.float32),
}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}
TWO_WEIGHTS = [0.25, 0.75]


def rounded_steps() -> dict[str, Values]:
    """A global use of a layer for each pair of element types."""
    rank, found = dist.get_rank(), {}
    for name, (dtype, layer_dtype) in ELEMENTS.items():
        layer = convert_batchnorm(fill(nn.BatchNorm2d(3)).to(layer_dtype))
        x, g = (value.to(dtype) for value in client_data((3, 4, 4), 2)[rank])
        with federated_statistics(layer, TWO_WEIGHTS[rank]):
            found[name] = run_layer(layer, x, g)
    return found


@cache
def rounded_steps_by_rank() -> list[dict[str, Values]]:
    return on_ranks(2, rounded_steps)


def dtypes(values: Values) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in values.items()}


def expected_buffers(p: list[float], xs: list[Tensor]) -> Values:
    """Running statistics after a new layer's first use."""
    mean, variance = global_moments(p, xs)
    return {"running_mean": 0.1 * mean, "running_var": 0.9 + 0.1 * variance}


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_element_type_is_torchs_and_as_exact_as_its_rounding(name: str) -> None:
    dtype, layer_dtype = ELEMENTS[name]
    rounded = [(x.to(dtype), g.to(dtype)) for x, g in client_data((3, 4, 4), 2)]
    torchs_own = run_layer(fill(nn.BatchNorm2d(3)).to(layer_dtype), *rounded[0])
    data = [(x.double(), g.double()) for x, g in rounded]
    running = expected_buffers(TWO_WEIGHTS, [x for x, _ in data])
    truths = layer_of_all_clients(data, TWO_WEIGHTS)
    for by_name, truth in zip(rounded_steps_by_rank(), truths, strict=True):
        found = by_name[name]
        assert dtypes(found) == dtypes(torchs_own)
        assert_close({n: found[n] for n in truth}, truth, 2 * ROUNDING[dtype])
        assert_close({n: found[n] for n in running}, running, ROUNDING[layer_dtype])


def autocast_step(rank: int, layer: nn.Module) -> tuple[Values, Tensor]:
    """One use on a linear layer's output under autocast to bfloat16; also that output."""
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(randn(3, 4, seed=51))
        linear.bias.zero_()
    x, g = client_data((4,), 2)[rank]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = linear(x.float())
        values = run_layer(layer, inputs, g[:, :3].bfloat16())
    return values, inputs.detach()


def autocast_on_this_rank() -> tuple[Values, Tensor]:
    rank = dist.get_rank()
    layer = convert_batchnorm(fill(nn.BatchNorm1d(3)))
    with federated_statistics(layer, TWO_WEIGHTS[rank]):
        return autocast_step(rank, layer)


def test_autocast_gives_torchs_types_and_the_pooled_problem_of_the_rounded_values() -> None:
    torchs_own, _ = autocast_step(0, fill(nn.BatchNorm1d(3)))
    measured = on_ranks(2, autocast_on_this_rank)
    xs = [x for _, x in measured]
    assert all(x.dtype == torch.bfloat16 for x in xs)
    gs = [g[:, :3].bfloat16() for _, g in client_data((4,), 2)]
    data = [(x.double(), g.double()) for x, g in zip(xs, gs, strict=True)]
    running = expected_buffers(TWO_WEIGHTS, [x for x, _ in data])
    truths = layer_of_all_clients(data, TWO_WEIGHTS)
    for (found, _), truth in zip(measured, truths, strict=True):
        assert dtypes(found) == dtypes(torchs_own)
        assert_close({name: found[name] for name in truth}, truth, 2.0**-7)
        assert_close({name: found[name] for name in running}, running, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 2), torch.channels_last_3d)],
    ids=["2d", "3d"],
)
def test_output_and_derivative_keep_the_memory_format_of_the_input(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    x, g = (randn(*shape, seed=seed).to(dtype) for seed in (1, 2))
    layer = convert_batchnorm(fill(nn.SyncBatchNorm(3)).to(dtype))
    plain = copy.deepcopy(layer)
    with federated_statistics(layer, weight=1.0), federated_statistics(plain, weight=1.0):
        inputs = [value.contiguous(memory_format=memory_format) for value in (x, g)]
        measured = run_layer(layer, *inputs)
        expected = run_layer(plain, x, g)
    assert measured["y"].stride() == inputs[0].stride()
    assert measured["dx"].stride() == inputs[0].stride()
    assert_close(measured, expected, 1e-14 if dtype == torch.float64 else 2e-2)


# Compiled networks


COMPILED = ["1d", "shared"]


def gradients_inside_and_outside(case: str, backend: str | None) -> list[Values]:
    """Gradients outside, inside, outside and inside the context; compiled if there is a backend."""
    rank, clients = dist.get_rank(), dist.get_world_size()
    x, y = networks.batches(case, clients)[rank]
    module = convert_batchnorm(networks.network(case))
    run = module if backend is None else torch.compile(module, backend=backend)
    found = []
    for inside in (False, True, False, True):
        module.zero_grad()
        with federation_if(inside, module, networks.weights(clients)[rank]):
            cross_entropy(run(x), y).backward()
        found.append({name: value.clone() for name, value in gradients(module).items()})
    return found


def federation_if(inside: bool, module: nn.Module, weight: float) -> AbstractContextManager[None]:
    return federated_statistics(module, weight) if inside else nullcontext()


def compiled_and_eager() -> dict[str, tuple[list[Values], list[Values]]]:
    return {
        case: (
            gradients_inside_and_outside(case, "aot_eager"),
            gradients_inside_and_outside(case, None),
        )
        for case in COMPILED
    }


@cache
def compiled_and_eager_by_rank() -> list[dict[str, tuple[list[Values], list[Values]]]]:
    return on_ranks(2, compiled_and_eager)


@pytest.mark.parametrize("case", COMPILED)
def test_a_compiled_network_enters_and_leaves_the_context_as_an_eager_one(case: str) -> None:
    for by_case in compiled_and_eager_by_rank():
        compiled, eager = by_case[case]
        for measured, expected in zip(compiled, eager, strict=True):
            assert pooled.worst_relative_error(measured, expected) < 1e-12
        outside, inside = compiled[:2]
        assert pooled.worst_relative_error(inside, outside) > 1e-3


def outputs_inside_and_outside(backend: str | None) -> list[Values]:
    """Output outside the context, then output and gradient inside it; little to compile."""
    rank = dist.get_rank()
    torch.manual_seed(1)
    linear = nn.Linear(4, 3, bias=False)
    module = convert_batchnorm(nn.Sequential(linear, nn.BatchNorm1d(3)).double())
    run = module if backend is None else torch.compile(module, backend=backend)
    x, _ = client_data((4,), 2)[rank]
    with torch.no_grad():
        outside = run(x)
    with federated_statistics(module, TWO_WEIGHTS[rank]):
        inside = run(x)
        (gradient,) = torch.autograd.grad(inside.pow(3).sum(), linear.weight)
    return [{"y": outside}, {"y": inside.detach(), "d linear": gradient}]


def inductor_and_eager() -> tuple[list[Values], list[Values]]:
    return outputs_inside_and_outside("inductor"), outputs_inside_and_outside(None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs g++")
def test_the_default_backend_compiles_to_the_same_numbers() -> None:
    for compiled, eager in on_ranks(2, inductor_and_eager):
        for measured, expected in zip(compiled, eager, strict=True):
            assert_close(measured, expected, 1e-12)


# Ranks at different layers


class TwoBranches(nn.Module):
    """Branches of given widths, run in a given order."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = nn.BatchNorm1d(left), nn.BatchNorm1d(right)

    def forward(self, x: Tensor, order: list[str]) -> dict[str, Tensor]:
        layers = {"left": self.left, "right": self.right}
        return {name: layers[name](x[:, : layers[name].num_features]) for name in order}


def order_of(rank: int) -> list[str]:
    return ["left", "right"] if rank == 0 else ["right", "left"]


def error_of(mix_up: Callable[[nn.Module, Tensor], object]) -> str:
    """What ``mix_up`` of two branches raises on this rank."""
    module = convert_batchnorm(TwoBranches(4, 4).double())
    with federated_statistics(module, 1 / dist.get_world_size()):
        try:
            mix_up(module, randn(5, 4).requires_grad_())
        except RuntimeError as error:
            return str(error)
    return "no error"


def mix_up_forward(module: nn.Module, x: Tensor) -> None:
    module(x, order_of(dist.get_rank()))


def mix_up_backward(module: nn.Module, x: Tensor) -> None:
    y = module(x, ["left", "right"])
    for name in order_of(dist.get_rank()):
        torch.autograd.grad(y[name].square().sum(), x)


MIX_UPS = {"forward": mix_up_forward, "backward": mix_up_backward}


def errors_of_mix_ups() -> dict[str, str]:
    return {name: error_of(mix_up) for name, mix_up in MIX_UPS.items()}


@cache
def errors_of_mix_ups_by_rank(clients: int) -> list[dict[str, str]]:
    return on_ranks(clients, errors_of_mix_ups)


@pytest.mark.parametrize("clients", [2, 3])
@pytest.mark.parametrize("mix_up", MIX_UPS)
def test_branches_of_one_width_in_different_orders_raise_on_every_rank(
    mix_up: str, clients: int
) -> None:
    for rank, messages in enumerate(errors_of_mix_ups_by_rank(clients)):
        assert messages[mix_up].startswith(f"layer {order_of(rank)[0]}: another rank sent")


def forward_mix_up_of_widths(left: int, right: int, folder: Path) -> None:
    """Leaves a file if the forward pass comes to an end."""
    module = convert_batchnorm(TwoBranches(left, right).double())
    with federated_statistics(module, 1 / dist.get_world_size()):
        module(randn(5, max(left, right)), order_of(dist.get_rank()))
    (folder / str(dist.get_rank())).touch()


@pytest.mark.parametrize(("left", "right", "clients"), [(3, 9, 2), (9, 3, 3)])
def test_branches_of_other_widths_in_different_orders_end_the_job_without_a_result(
    left: int, right: int, clients: int, tmp_path: Path
) -> None:
    with pytest.raises(RankFailed) as failure:
        on_ranks(clients, forward_mix_up_of_widths, left, right, tmp_path, seconds=20)
    assert "no answer within" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_made_inside_the_context_is_outside_it() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with federated_statistics(layer, weight=0.5):
        twin = copy.deepcopy(layer)
    assert is_local(twin)


def test_references_outside_the_module_tree_follow_the_conversion() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    alias = module[1]
    assert convert_batchnorm(module)[1] is alias  # type: ignore[index]
    assert isinstance(alias, FedTANBatchNorm)


def test_a_refused_conversion_changes_nothing() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="LazyBatchNorm1d"):
        convert_batchnorm(module)
    assert type(module[0]) is nn.BatchNorm1d


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_torchscript_is_refused() -> None:
    with pytest.raises(ValueError, match="TorchScript"):
        convert_batchnorm(torch.jit.script(nn.Sequential(nn.BatchNorm1d(3))))


def test_a_converted_layer_takes_the_inputs_that_it_took_before() -> None:
    layer = convert_batchnorm(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="4D"):
        layer(torch.randn(4, 3))


def many_calls() -> int:
    layer = convert_batchnorm(nn.BatchNorm1d(2))
    with federated_statistics(layer, 0.5):
        for _ in range(600):
            layer(torch.randn(3, 2))
    return int(layer.get_buffer("num_batches_tracked"))


def test_a_context_may_stay_open_for_long() -> None:
    assert on_ranks(2, many_calls) == [600, 600]
