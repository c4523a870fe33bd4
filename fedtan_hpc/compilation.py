"""torch.compile of a client's step, tried before the first round and given up by all ranks or none.

The collectives inside a synchronised step are opaque to the compiler (``operator``).  Compiled code
may run the backward pass of parallel branches in another order than eager code, so that ranks must
not mix the two: they agree by one collective.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import comm
from .average import model_tensors
from .batchnorm import normalised_by
from .data import Samples
from .federation import LayerCall, Update
from .loss import Loss, Mean, mean_loss


def compiled(loss: Loss, model: nn.Module, batch: Samples, synchronised: bool) -> Loss:
    """``loss`` compiled for batches like ``batch``, with and (if ``synchronised``) without BN's own
    statistics; or ``loss`` itself, and a line that says why, if any rank cannot compile.

    The model and the random state are as before.  Compiled code is kept on disk by torch, so that
    the next run on the same machine takes it from there.
    """
    start = time.perf_counter()
    compiled_mean: Mean | None = None
    torch.compiler.reset()  # of a sweep's earlier points, which count against a limit
    try:
        compiled_mean = torch.compile(mean_loss)
        _rehearse(replace(loss, compiled=compiled_mean), model, batch, synchronised)
        reason = ""
    except Exception as error:  # of the compiler, of the C++ compiler, of the network
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    reasons = comm.all_gather_object(reason)
    for rank, why in enumerate(reasons):
        if why:
            if comm.rank() == 0:
                message = f"compile=true: rank {rank} cannot compile ({why}): all go on eagerly"
                print(message, file=sys.stderr, flush=True)
            return loss
    seconds = time.perf_counter() - start
    return replace(loss, compiled=compiled_mean, compile_seconds=seconds)


def _rehearse(loss: Loss, model: nn.Module, batch: Samples, synchronised: bool) -> None:
    """Run a step of each kind, which compiles it; nothing that it does remains."""
    before = [value.detach().clone() for value in model_tensors(model)]
    was_training = model.training
    device = batch.inputs.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.train()
            loss(model, batch).backward()
            if synchronised:
                with normalised_by(model, Rehearsal()):
                    loss(model, batch).backward()
    finally:
        model.train(was_training)
        model.zero_grad()
        with torch.no_grad():
            for value, old in zip(model_tensors(model), before, strict=True):
                value.copy_(old)


class Rehearsal:
    """A context, and a use of a layer, with statistics of one's own and nobody to meet."""

    is_stacked = False
    mask_KN = None
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
