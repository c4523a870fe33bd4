"""torch.compile of a client's step, tried before the first round and given up by all ranks or none.

The collectives inside a synchronised step are opaque to the compiler (``operator``).  Compiled code
may run the backward pass of parallel branches in another order than eager code, so that ranks must
not mix the two: they agree by one collective.

On a GPU a step is replayed as CUDA graphs: one for a local step's forward pass and one for its
backward pass, while a synchronised step has one for each stretch between exchanges.  Those stay
outside, for the weights and tags that they send change from round to round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm import compile_ops
from ..batchnorm.context import normalised_by
from ..batchnorm.running_norm import held
from ..batchnorm.statistics_call import LayerCall, Update
from ..config.algorithms import Normaliser, RoundPlan
from ..config.errors import one_line
from ..data.batching import Samples
from ..distributed import collectives, process_group
from ..distributed.model_average import model_tensors
from .local_training import set_training_mode
from .loss import Loss, mean_loss

GRAPHS = "reduce-overhead"
"""torch's name for compiling with CUDA graphs."""
_TAKES = {GRAPHS: 3, "default": 1}
"""Steps of a kind before it is known to work: graphs are warmed up, recorded and replayed."""


def compiled(
    loss: Loss, model: nn.Module, batch: Samples, plans: Sequence[RoundPlan], synchronised: bool
) -> Loss:
    """``loss`` compiled for batches like ``batch`` and local steps of all ``plans``, and (if
    ``synchronised``) for global statistics; or ``loss`` itself, and a line that says why, if any
    rank cannot compile.

    The model and the random state are as before.  Compiled code is kept on disk by torch, so that
    the next run on the same machine takes it from there.
    """
    start = time.perf_counter()
    plans = list({plan.normaliser: plan for plan in plans}.values())
    for mode in _modes(batch.inputs.device):
        found, reason = _attempt(mode, loss, model, batch, plans, synchronised)
        reasons = collectives.all_gather_object(reason)
        if not any(reasons):
            return replace(found, compile_seconds=time.perf_counter() - start)
        _tell(mode, reasons)
    return loss


def _modes(device: torch.device) -> list[str]:
    """torch's names for ways to compile, the best first."""
    has_graphs = device.type == "cuda" and compile_ops.CAN_CUT_GRAPHS
    return [GRAPHS, "default"] if has_graphs else ["default"]


def _options(mode: str, synchronised: bool) -> dict[str, Any]:
    """Those that ``mode`` stands for; ``synchronised`` steps keep the order of their exchanges.

    torch would order the backward passes of parallel branches by the memory that a rank's batch
    takes, and ranks with other batches otherwise.
    """
    options = torch._inductor.list_mode_options(mode)
    return {**options, "reorder_for_peak_memory": False} if synchronised else options


def _attempt(
    mode: str,
    loss: Loss,
    model: nn.Module,
    batch: Samples,
    plans: Sequence[RoundPlan],
    synchronised: bool,
) -> tuple[Loss, str]:
    """``loss`` compiled, and why it cannot be, if so."""
    torch.compiler.reset()  # of a sweep's earlier points, which count against a limit
    try:
        loss = replace(
            loss, compiled=torch.compile(mean_loss, options=_options(mode, synchronised))
        )
        for _ in range(_TAKES[mode]):
            _rehearse(loss, model, batch, plans, synchronised)
    except Exception as error:  # of the compiler, of the C++ compiler, of the network
        return loss, one_line(error)
    return loss, ""


def _tell(mode: str, reasons: Sequence[str]) -> None:
    """Why the first rank that cannot compile cannot, from rank 0."""
    if process_group.rank() == 0:
        rank, why = next((rank, why) for rank, why in enumerate(reasons) if why)
        what, instead = "compile", "eagerly"
        if mode == GRAPHS:
            what, instead = "use CUDA graphs", "without them"
        message = f"compile=true: rank {rank} cannot {what} ({why}): all go on {instead}"
        print(message, file=sys.stderr, flush=True)


def _rehearse(
    loss: Loss, model: nn.Module, batch: Samples, plans: Sequence[RoundPlan], synchronised: bool
) -> None:
    """Run a step of each kind, which compiles it; nothing that it does remains."""
    before = [value.detach().clone() for value in model_tensors(model)]
    was_training = model.training
    device = batch.inputs.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for plan in plans:
                set_training_mode(model, plan)
                with held(model) if plan.normaliser is Normaliser.running else nullcontext():
                    loss(model, batch).backward()
                model.zero_grad()  # as steps do: graphs write gradients where the last ones are
            if synchronised:
                set_training_mode(model, plans[0])
                with normalised_by(model, DryRunStatistics()):
                    loss(model, batch).backward()
    finally:
        model.train(was_training)
        model.zero_grad()
        with torch.no_grad():
            for value, old in zip(model_tensors(model), before, strict=True):
                value.copy_(old)


class DryRunStatistics:
    """A context, and a use of a layer, with statistics of one's own and nobody to meet."""

    is_stacked = False
    mask_KN = None
    own = None
    sizes: Sequence[int] = ()

    def call(self, index: int, update: Update) -> LayerCall:
        """Any use of any layer."""
        return self

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What came in."""
        return mean_KC[0], variance_KC[0]

    def share_derivatives(self, counts: Sequence[int], sums_K2C: Tensor) -> Tensor:
        """What came in, in float64."""
        return sums_K2C[0].double()
