"""The contexts in which BN statistics are global."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..distributed import collectives, process_group, structure
from ..distributed.lockstep import Lockstep
from . import compile_ops
from .conversion import batchnorm_layers, number_of_conversions
from .layer import FedTANBatchNorm, move_running_statistics
from .messages import merge
from .statistics_call import BatchNormContext, GlobalStatistics


def federated_statistics(
    module: nn.Module,
    weight: float,
    group: process_group.Group = None,
    *,
    layers: Collection[str] | None = None,
) -> AbstractContextManager[None]:
    """Makes the statistics of ``module``'s BN layers global while the context is open.

    ``weight`` is this rank's p_k; the weights of the group's ranks (default: all ranks) must be
    >= 0 and sum to 1.  All ranks run the same layers in the same order, forward and backward, with
    batches of any size; a rank with weight 0 takes part and adds nothing.  A BN layer costs one
    collective forward (two for float64 inputs) and one backward.  Without a process group this is
    the only client.  With activation checkpointing the backward pass belongs inside the context
    too, because it runs layers again.  Running statistics move when the context ends.  With
    ``layers``, equal on all ranks, only the BN layers of these names are global; the others have
    the statistics of this rank's batch.

    Raises ``ValueError`` if the module has unconverted BN layers or none of such a name, or if the
    BN layers of the ranks differ (compared at the first use of such a model), and ``RuntimeError``
    if the ranks are at different models.  The forward pass of a layer raises ``ValueError`` on all
    ranks if the weights are not valid, a batch with a weight above 0 is empty or all ranks together
    have one value per channel, and ``RuntimeError`` if the ranks are at different layers or calls;
    on a GPU these errors are raised when the context ends.
    """
    chosen = chosen_layers(module, layers)
    return _global_statistics(module, chosen, weight, group, None, model_tag(chosen, group))


def federated_backward(
    modules: Sequence[nn.Module],
    losses: Sequence[Callable[[], Tensor]],
    weights: Sequence[float],
    group: process_group.Group = None,
    *,
    layers: Collection[str] | None = None,
) -> list[Tensor]:
    """Runs the forward and backward pass of all clients of this rank, with global statistics.

    The modules of all ranks are copies of one model.  Client k has one, a function ``losses[k]``
    that runs it and returns the loss F_k (0-d), and the weight p_k; the weights of all clients of
    all ranks sum to 1.  Gradients are added to the modules' parameters.  Returns the losses,
    detached.  The clients run in lock-step: all of them together cost as many collectives as one
    client, whatever the sizes of their batches.  A rank without a client gives one module, a batch
    of one sample and the weight 0.  ``layers`` are those of ``federated_statistics``.

    Raises what ``federated_statistics`` raises, and ``ValueError`` if modules, losses and weights
    are not equally many, or a module serves two clients.  The clients run in threads, which inherit
    the GPU, gradient mode, autocast and number of threads of the caller, and no other mode.
    """
    if not len(modules) == len(losses) == len(weights) >= 1:
        raise ValueError("modules, losses and weights must be equally many, and at least one")
    if len({id(module) for module in modules}) < len(modules):
        raise ValueError("every client needs a module of its own, for example a copy.deepcopy")
    tag = model_tag(chosen_layers(modules[0], layers), group, are_copies=True)

    def statistics(index: int, lockstep: Lockstep[Tensor] | None) -> AbstractContextManager[None]:
        module = modules[index]
        chosen = chosen_layers(module, layers)
        return _global_statistics(module, chosen, weights[index], group, lockstep, tag)

    return backward_with(statistics, losses, group)


def statistics_of_client(
    module: nn.Module, names: Collection[str], share: float, group: process_group.Group
) -> AbstractContextManager[None]:
    """Gives the BN layers of ``names`` the statistics of a client that the ranks of ``group`` hold.

    This rank's batch is a ``share`` of the client's.  Modules are copies of one model on all ranks.
    """
    chosen = chosen_layers(module, names)
    tag = model_tag(chosen, group, are_copies=True)
    return _global_statistics(module, chosen, share, group, None, tag)


def backward_with(
    statistics: Callable[[int, Lockstep[Tensor] | None], AbstractContextManager[None]],
    losses: Sequence[Callable[[], Tensor]],
    group: process_group.Group = None,
) -> list[Tensor]:
    """Runs the clients' passes in lock-step, each inside its context, and returns their losses.

    ``statistics`` makes the context of the client with an index; the client exchanges its messages
    by the lock-step, or is the only one on this rank.
    """
    passes = [partial(_forward_and_backward, loss) for loss in losses]
    if len(passes) == 1:
        with statistics(0, None):
            return [passes[0]()]
    lockstep = Lockstep(passes, lambda parts: collectives.sum_for_training(merge(parts), group))
    with ExitStack() as stack:
        for index in range(len(passes)):
            stack.enter_context(statistics(index, lockstep))
        return lockstep.run()


def _forward_and_backward(loss: Callable[[], Tensor]) -> Tensor:
    value = loss()
    value.backward()
    return value.detach()


@contextmanager
def _global_statistics(
    module: nn.Module,
    chosen: Mapping[str, FedTANBatchNorm],
    weight: float,
    group: process_group.Group,
    lockstep: Lockstep[Tensor] | None,
    tag: int,
) -> Iterator[None]:
    statistics = GlobalStatistics([float(weight)], group, list(chosen), lockstep)
    statistics.model_tag = tag
    statistics.move = move_running_statistics
    with normalised_by(module, statistics, chosen):
        try:
            yield
            statistics.close()
        finally:
            statistics.is_open = False


def model_tag(
    layers: Mapping[str, FedTANBatchNorm],
    group: process_group.Group = None,
    are_copies: bool = False,
) -> int:
    """Returns the number that messages carry to tell the model of ``layers`` from others.

    At the first use of such a model the ranks compare its layers.  Models with equal layers differ
    in the place at which ``convert_batchnorm`` took them, unless ``are_copies``: then they are
    clients' copies of one model.  These places tell models apart if all ranks have converted
    equally many models until the first use, and only models of that time.

    Raises ``ValueError`` if the ranks' layers differ, and ``RuntimeError`` if their models do.
    """
    if not layers:
        return 0
    first = next(iter(layers.values()))
    described = {
        name: f"{layer.num_features} channels, {_dtype(layer)}" for name, layer in layers.items()
    }
    numbers = first._model_number, number_of_conversions()
    device = _device(first)
    agreement = structure.agree("BN layers", _CALL, described, group, device, numbers)
    if are_copies:
        return agreement.digest
    models, conversions = zip(*agreement.numbers, strict=True)
    told_apart = len(set(conversions)) == 1
    if told_apart and len(set(models)) > 1:
        raise RuntimeError(
            "the ranks are at different models: those that convert_batchnorm took as number "
            + ", ".join(f"{number} on rank {rank}" for rank, number in enumerate(models))
        )
    place = first._model_number if told_apart and first._model_number <= conversions[0] else 0
    return agreement.digest + _BETWEEN_MODELS * place


_CALL = "the start of federated_statistics"
_BETWEEN_MODELS = 7919
"""Distance of the tags of models with equal layers: a prime."""


def _dtype(layer: FedTANBatchNorm) -> str:
    value = layer.weight if layer.weight is not None else layer.running_mean
    return "any dtype" if value is None else str(value.dtype).removeprefix("torch.")


def _device(layer: FedTANBatchNorm) -> torch.device:
    value = layer.weight if layer.weight is not None else layer.running_mean
    return torch.device("cpu") if value is None else value.device


def chosen_layers(
    module: nn.Module, names: Collection[str] | None
) -> Mapping[str, FedTANBatchNorm]:
    """Returns the BN layers of ``names`` by name in the module's order; all for None.

    Raises ``ValueError`` for a name that no BN layer has.
    """
    layers = batchnorm_layers(module)
    if names is None:
        return layers
    if unknown := sorted(set(names) - set(layers)):
        raise ValueError(f"layers has {unknown[0]!r}, which is no BN layer of the module")
    return {name: layer for name, layer in layers.items() if name in names}


@contextmanager
def normalised_by(
    module: nn.Module,
    context: BatchNormContext,
    chosen: Mapping[str, FedTANBatchNorm] | None = None,
) -> Iterator[None]:
    """Lets ``context`` provide the statistics of the ``chosen`` layers of ``module``, or of all."""
    layers = list((batchnorm_layers(module) if chosen is None else chosen).values())
    outer = []
    for around in {id(each): each for layer in layers if (each := layer._context)}.values():
        around.move_running_statistics()  # in the order of the layers' uses
    for index, layer in enumerate(layers):
        if layer._layer_id is None:
            layer._layer_id = compile_ops.register(layer)
            layer.compiled_calls = []
        outer.append((layer._context, layer._index, layer.compiled_calls))
        layer._context, layer._has_context, layer._index = context, True, index
        layer.compiled_calls = []
    try:
        with compile_ops.checkpoints_traced():
            yield
    finally:
        for layer, (outer_context, index, calls) in zip(layers, outer, strict=True):
            compile_ops.forget(layer.compiled_calls)
            layer._context, layer._has_context = outer_context, outer_context is not None
            layer._index, layer.compiled_calls = index, calls
