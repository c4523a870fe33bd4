"""The losses of a round's participants, which every rank learns so that all ranks stop together."""

import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..config.errors import RunError
from ..data.batching import ClientSamples, Samples
from ..data.client_store import Client
from ..distributed import collectives
from ..runtime.signals import STOP_SIGNALS, StopRequest
from ..runtime.transfer import send


@dataclass(frozen=True)
class RoundLosses:
    """Exchanges one value for each participant of a round between the ranks.

    ``weights`` are the p_k of all participants by client number, ``clients`` those that this rank
    hosts; messages are on ``device``.
    """

    weights: Mapping[int, float]
    clients: Sequence[Client]
    device: torch.device

    def mean(self, number: int, losses: Sequence[Tensor], stop: StopRequest) -> float:
        """Returns sum_k p_k loss_k, where ``losses`` are those of this rank's clients, 0-d each.

        The same message carries the signals that ranks have received; ``stop.agreed_signal`` is
        then equal on all ranks.  Raises ``RunError`` on every rank if a loss is not finite.
        """
        message = self._message(losses, extra=2)
        signal_received = [stop.signal, bool(stop.signal)]
        signals = torch.tensor(signal_received, dtype=message.dtype, device="cpu")
        message[-2:] = send(signals, self.device)
        *all_losses, signals_sum, ranks = collectives.sum_as_list(message)
        stop.agreed_signal = common_signal(signals_sum, ranks)
        loss_of = dict(zip(self.weights, all_losses, strict=True))
        bad = [client for client, loss in loss_of.items() if not math.isfinite(loss)]
        if bad:
            # Global statistics carry one client's bad samples to all clients: find the source.
            bad = self._with_bad_samples() or bad
            whose = f"client {bad[0]}" if len(bad) == 1 else f"clients {bad}"
            raise RunError(
                f"round {number}: the training loss of {whose} is not finite "
                f"({loss_of[bad[0]]}); a smaller optimizer.lr may help",
                on_all_ranks=True,
            )
        return float(sum(self.weights[client] * loss for client, loss in loss_of.items()))

    def _with_bad_samples(self) -> list[int]:
        is_bad = [self._are_bad(client.samples) for client in self.clients]
        counts = collectives.sum_as_list(self._message(is_bad))
        return [client for client, count in zip(self.weights, counts, strict=True) if count]

    def _are_bad(self, samples: ClientSamples) -> Tensor:
        """Returns whether inputs in memory are not finite, 0-d; those that are read are checked."""
        leaves = tree_leaves(samples.inputs) if isinstance(samples, Samples) else []
        bad = [~leaf.isfinite().all() for leaf in leaves if leaf.is_floating_point()]
        return torch.stack(bad).any() if bad else torch.tensor(False)

    def _message(self, values: Sequence[Tensor], extra: int = 0) -> Tensor:
        """Returns a float64 vector with this rank's values in it and 0 for all other clients."""
        index = {client: position for position, client in enumerate(self.weights)}
        message = torch.zeros(len(index) + extra, dtype=torch.float64, device=self.device)
        for client, value in zip(self.clients, values, strict=True):
            message[index[client.number]] = value
        return message


def common_signal(signals_sum: float, ranks: float) -> int:
    """Returns the signal that ``ranks`` ranks received, from the sum of its numbers; 0 for none.

    Ranks that received different signals stop as after SIGTERM.
    """
    number = signals_sum / ranks if ranks else 0
    return int(number) if number in (0, *STOP_SIGNALS) else int(signal.SIGTERM)
