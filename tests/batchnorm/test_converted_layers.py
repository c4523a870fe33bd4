"""What a converted layer still is: its class, its settings, other subclasses, and other tools."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedtan_hpc
from fedtan_hpc import FedTANBatchNorm, convert_batchnorm, federated_statistics, revert_batchnorm
from fedtan_hpc.batchnorm.running_norm import normalise_by_running
from tests.batchnorm.layers import randn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)).double()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
@pytest.mark.parametrize("mixes", [None, False, True])
def test_a_layer_stays_an_instance_of_its_class(kind: type[nn.Module], mixes: bool | None) -> None:
    layer = convert_batchnorm(kind(3))
    if mixes is not None:
        normalise_by_running(layer, mixes)
    for value in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(value, kind)
        assert isinstance(value, FedTANBatchNorm)
        assert type(value) is type(layer)
        assert value.state_dict().keys() == layer.state_dict().keys()
    assert type(revert_batchnorm(layer)) is kind
    assert not hasattr(layer, "mix")


def test_a_frozen_layer_is_frozen_inside_the_context_too() -> None:
    model = convert_batchnorm(network())
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    before = copy.deepcopy(model.state_dict())
    with federated_statistics(model, 1.0):
        model(randn(4, 2, 6, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def without_tracking(layer: Any) -> None:
    layer.track_running_stats = False


def without_count(layer: Any) -> None:
    layer.num_batches_tracked = None


def without_count_or_momentum(layer: Any) -> None:
    layer.num_batches_tracked = layer.momentum = None


def without_moments(layer: Any) -> None:
    layer.running_mean = layer.running_var = None


CHANGES = [without_tracking, without_count, without_count_or_momentum, without_moments]


@pytest.mark.parametrize("change", CHANGES)
def test_buffers_move_as_torch_moves_them(change: object) -> None:
    assert callable(change)
    torchs, ours = nn.BatchNorm1d(2).double(), convert_batchnorm(nn.BatchNorm1d(2).double())
    x = randn(8, 2) + 5
    for layer in (torchs, ours):
        change(layer)
    torchs(x)
    with federated_statistics(ours, 1.0):
        ours(x)
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


def test_half_of_the_running_statistics_is_refused_as_by_torch() -> None:
    layer: Any = convert_batchnorm(nn.BatchNorm1d(2))
    layer.running_mean = None
    with federated_statistics(layer, 1.0), pytest.raises(ValueError, match="neither be None"):
        layer(torch.randn(8, 2))


def test_a_layer_without_values_takes_any_width() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(10, affine=False, track_running_stats=False))
    x = randn(5, 3)
    expected = nn.BatchNorm1d(3, affine=False, track_running_stats=False)(x)
    torch.testing.assert_close(layer(x), expected)
    with federated_statistics(layer, 1.0):
        torch.testing.assert_close(layer(x), expected)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("of_layer", DTYPES)
@pytest.mark.parametrize("of_input", DTYPES)
def test_dtypes_mix_where_torch_mixes_them(of_input: torch.dtype, of_layer: torch.dtype) -> None:
    x = randn(4, 2).to(of_input)
    try:
        expected = nn.BatchNorm1d(2).to(of_layer)(x).dtype
    except RuntimeError:
        expected = None
    layer = convert_batchnorm(nn.BatchNorm1d(2).to(of_layer))
    with federated_statistics(layer, 1.0):
        if expected is None:
            with pytest.raises(RuntimeError, match="use one dtype"):
                layer(x)
        else:
            assert layer(x).dtype is expected


def test_a_process_group_that_gets_lost_is_named() -> None:
    layer = nn.SyncBatchNorm(3, process_group=object())
    with pytest.warns(UserWarning, match=r"layer \(root\): the process_group"):
        convert_batchnorm(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_batchnorm(nn.SyncBatchNorm(3))


class ActivatedBatchNorm(nn.BatchNorm2d):
    """What timm's layers do: BN, dropout and an activation in one module."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


def activate(layer: ActivatedBatchNorm, y: Tensor) -> Tensor:
    return layer.act(y)  # type: ignore[no-any-return]


BY_NAME = type("BatchNormAct2d", (ActivatedBatchNorm,), {"__module__": "timm.layers.norm_act"})


@pytest.mark.parametrize("kind", [ActivatedBatchNorm, BY_NAME])
def test_other_kinds_keep_what_they_do_after_bn(kind: type[ActivatedBatchNorm]) -> None:
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), kind(3)).double()
    ours = convert_batchnorm(copy.deepcopy(plain), None if kind is BY_NAME else {kind: activate})
    x = randn(4, 2, 6, 6)
    for module in (plain, ours):
        with federated_statistics(ours, 1.0):
            module(x).square().sum().backward()
    for value, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, expected.grad)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), plain.train(training)(x))
    torch.testing.assert_close(revert_batchnorm(copy.deepcopy(ours)).eval()(x), plain.eval()(x))


def test_the_error_for_an_unknown_kind_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"layer 0 is a ActivatedBatchNorm.*pass kinds="):
        convert_batchnorm(nn.Sequential(ActivatedBatchNorm(3)))


def test_torch_fx_takes_a_converted_layer_as_one_unit() -> None:
    graph = torch.fx.symbolic_trace(convert_batchnorm(network())).graph
    targets = [node.target for node in graph.nodes if node.op == "call_module"]
    assert targets == ["0", "1", "2"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_converted_model_can_be_traced_and_a_reverted_one_scripted() -> None:
    model, x = convert_batchnorm(network()).eval(), randn(4, 2, 6, 6)
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    with pytest.raises(RuntimeError, match=r"script\s+fedtan_hpc.revert_batchnorm"):
        torch.jit.script(model)
    scripted = torch.jit.script(revert_batchnorm(copy.deepcopy(model)))
    torch.testing.assert_close(scripted(x), expected)
    assert isinstance(model[1], FedTANBatchNorm)  # type: ignore[index]


def test_a_converted_model_can_be_exported() -> None:
    model, x = convert_batchnorm(network()).eval(), randn(4, 2, 6, 6)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reverted_model_can_be_fused() -> None:
    model, x = convert_batchnorm(network()).eval(), randn(4, 2, 6, 6)
    plain = revert_batchnorm(copy.deepcopy(model))
    fused = torch.ao.quantization.fuse_modules(plain, [["0", "1"]])
    torch.testing.assert_close(fused(x), model(x))


def test_the_public_face_has_both_directions() -> None:
    assert fedtan_hpc.revert_batchnorm is revert_batchnorm
