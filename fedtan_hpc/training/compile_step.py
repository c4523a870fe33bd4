"""torch.compile of a client's step, tried before the first round: all ranks compile, or none.

The collectives in a synchronised step are opaque to the compiler (``batchnorm.compile_ops``).
Compiled code may run the backward pass of parallel branches in another order than eager code.
Ranks must not mix the two, so they agree with one collective.

On a GPU a step is replayed as CUDA graphs: one for a local step's forward pass and one for its
backward pass; a synchronised step has one for each stretch between exchanges.  The exchanges stay
outside of graphs, because the weights and tags that they send change from round to round.

Used by ``job.setup``.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm import compile_ops
from ..batchnorm.context import normalised_by
from ..batchnorm.messages import Derivatives
from ..batchnorm.statistics_call import LayerCall
from ..config.algorithms import RoundPlan
from ..config.errors import one_line, printable
from ..data.batching import Samples
from ..distributed import collectives, process_group
from ..distributed.model_average import model_tensors
from ..runtime import global_random
from ..runtime.transfer import copy_all
from .local_step import Loss, local_normalisation, set_training_mode

GRAPHS = "reduce-overhead"
"""torch's name of the mode that uses CUDA graphs."""
_TRIAL_STEPS = {GRAPHS: 3, "default": 1}
"""Steps of each kind until it is known to work: graphs are warmed up, recorded and replayed."""


def compiled(
    loss: Loss, model: nn.Module, batch: Samples, plans: Sequence[RoundPlan], synchronised: bool
) -> Loss:
    """Returns ``loss`` compiled, or ``loss`` itself and a message if any rank cannot compile.

    Compiles for batches like ``batch``, for the local steps of all ``plans`` and, with
    ``synchronised``, for global statistics.  The model and the random state stay unchanged.  torch
    keeps compiled code on disk, and the next run on the machine takes it from there.
    """
    start = time.perf_counter()
    trial = Trial(model, batch, list({p.normaliser: p for p in plans}.values()), synchronised)
    for mode in _modes(batch.device):
        result, reason = trial.compile(mode, loss)
        reasons = collectives.all_gather_object(reason)
        if not any(reasons):
            return replace(result, compile_seconds=time.perf_counter() - start)
        _print_reason(mode, reasons)
    return loss


def _modes(device: torch.device) -> list[str]:
    """Returns torch's names of the modes to try, the fastest first."""
    has_graphs = device.type == "cuda" and compile_ops.CAN_CUT_GRAPHS
    return [GRAPHS, "default"] if has_graphs else ["default"]


def _print_reason(mode: str, reasons: Sequence[str]) -> None:
    """Prints on rank 0 why the first rank that cannot compile cannot."""
    if process_group.rank() == 0:
        rank, why = next((rank, why) for rank, why in enumerate(reasons) if why)
        what, instead = "compile", "run eagerly"
        if mode == GRAPHS:
            what, instead = "use CUDA graphs", "compile without them"
        message = f"compile=true: rank {rank} cannot {what} ({why}): all ranks {instead}"
        print(printable(message), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Trial:
    """The kinds of steps to compile: a local step of each plan, and synchronised ones if set.

    Synchronised steps have no frozen statistics in any plan.
    """

    model: nn.Module
    batch: Samples
    plans: Sequence[RoundPlan]
    synchronised: bool

    def compile(self, mode: str, loss: Loss) -> tuple[Loss, str]:
        """Returns ``loss`` compiled and an empty string, or the reason why it cannot be."""
        torch.compiler.reset()  # a sweep's earlier runs count against torch's limit
        options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode))
        if self.synchronised:
            # torch would order parallel branches by memory, which differs between ranks' batches.
            options["reorder_for_peak_memory"] = False
        try:
            loss = replace(loss, compiled=torch.compile(loss.objective.mean_loss, options=options))
            for _ in range(_TRIAL_STEPS[mode]):
                self.run_steps(loss)
        except Exception as error:  # from torch, the C++ compiler or the network
            return loss, one_line(error)
        return loss, ""

    def run_steps(self, loss: Loss) -> None:
        """Runs a step of each kind, which compiles it, and restores the model afterwards."""
        model, batch, device = self.model, self.batch, self.batch.device
        before = [value.detach().clone() for value in model_tensors(model)]
        was_training = model.training
        try:
            with global_random.preserved([device] if device.type == "cuda" else []):
                for plan in self.plans:
                    set_training_mode(model, plan)
                    with local_normalisation(model, plan):
                        loss(model, batch).backward()
                    model.zero_grad()  # CUDA graphs write gradients to where the last ones are
                if self.synchronised:
                    set_training_mode(model)
                    with normalised_by(model, DryRunStatistics()):
                        loss(model, batch).backward()
        finally:
            model.train(was_training)
            model.zero_grad()
            copy_all(model_tensors(model), before)


class DryRunStatistics:
    """The context and the call of a synchronised step that exchanges nothing with other ranks."""

    is_stacked = False
    mask_KN = None
    local_buffers = None
    sizes: Sequence[int] = ()

    def call(self, index: int, owner: Any) -> LayerCall:
        """Returns the call for any layer."""
        return self

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns this rank's moments, (C,) each."""
        return mean_KC[0], variance_KC[0]

    def share_derivatives(self, counts: Sequence[int], sums: Derivatives) -> Tensor:
        """Returns this rank's sums, (2C,) in float64."""
        return sums.scaled()[0]

    def move_running_statistics(self) -> None:
        """Does nothing: the running statistics stay as they are."""
