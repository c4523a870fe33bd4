"""The gradients of a client that several ranks hold, summed during the backward pass.

Parameters are in buckets, and in steps that are not synchronised each bucket is summed as soon as
the backward pass has made its last gradient.  The gradients of a small model are one message after
the pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import collectives
from ..distributed.process_group import Group
from ..models.parameter_groups import pack, unpack

_BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients with which a bucket is full, as by default in DistributedDataParallel.

For ResNet-18 (45 MB) a round took 0.9 of the time of one with a single message with buckets of
25 MB, and 0.96 to 1.0 with buckets of 4 MB: 2 ranks on 2 cores (AMD EPYC), gloo and MPI, torch
2.13.0, by the command of docs/large_clients.md."""
_CALL = "a client's gradients"


class _Sum(NamedTuple):
    """The sum of a bucket that is under way."""

    message: Tensor
    wait: Callable[[], None]


class ClientGradients:
    """The gradients of the trained ``values`` on a rank whose samples are ``share`` of the batch.

    ``group`` are the client's ranks, or None if this rank has all of it.  ``overlap_group``, if it
    is given, are the same ranks: gradients that are sent there during the backward pass and the
    messages of BN layers do not wait for each other.  ``values`` have one order on all ranks, about
    that of the forward pass.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        share: float,
        group: Group,
        overlap_group: Group = None,
    ) -> None:
        self._values, self._share, self._group = values, share, group
        self._overlap_group = overlap_group
        buckets = _buckets(values[::-1]) if overlap_group is not None else []
        self._buckets = buckets if len(buckets) > 1 else []
        self._sums: list[_Sum] = []
        self._ready: set[int] = set()
        self._sent: set[int] = set()

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Sums buckets during the backward passes in the block, if there are several."""
        values = self._values if self._buckets else []
        hooks = [value.register_post_accumulate_grad_hook(self._take) for value in values]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, value: Tensor) -> None:
        """Starts the sums of the next buckets if ``value`` was the last that they waited for.

        All ranks sum the same buckets in the same order, whatever is ready first.
        """
        if id(value) in self._sent:
            raise RuntimeError(
                "a gradient has grown after it was sent to the client's other ranks: a part of the "
                "model is computed anew more than once; use checkpoint(use_reentrant=False)"
            )
        self._ready.add(id(value))
        for bucket in self._buckets[len(self._sums) :]:
            if any(id(each) not in self._ready for each in reversed(bucket)):
                return
            self._start(bucket)

    def _start(self, bucket: Sequence[Tensor]) -> None:
        message = self._part(bucket)
        wait = collectives.start_sum_for_client(message, self._overlap_group, _CALL)
        self._sums.append(_Sum(message, wait))
        self._sent |= {id(value) for value in bucket}

    def average(self) -> None:
        """Sets the gradients to the client's: the sum over its ranks, weighted by their shares.

        On every rank all of ``values`` have a gradient.
        """
        if self._group is None:
            return
        if not self._buckets:
            message = collectives.sum_for_client(self._part(self._values), self._group, _CALL)
            unpack(message, _gradients(self._values))
            return
        for bucket in self._buckets[len(self._sums) :]:
            self._start(bucket)
        for bucket, each in zip(self._buckets, self._sums, strict=True):
            each.wait()
            unpack(each.message, _gradients(bucket))
        self._sums, self._ready, self._sent = [], set(), set()

    def _part(self, values: Sequence[Tensor]) -> Tensor:
        message = pack(_gradients(values))
        return message.mul_(self._share) if self._share else torch.zeros_like(message)


def _gradients(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.grad for value in values if value.grad is not None]


def _buckets(values: Sequence[Tensor]) -> list[list[Tensor]]:
    """Returns ``values`` in parts that end where they have become large enough."""
    buckets: list[list[Tensor]] = []
    size = _BUCKET_BYTES
    for value in values:
        if size >= _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(value)
        size += value.nbytes
    return buckets
