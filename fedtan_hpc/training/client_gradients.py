"""The gradients of a client that several ranks hold: one sum, or sums during the backward pass.

A GPU can send gradients while it computes others.  So over NCCL each bucket of parameters is summed
as soon as the backward pass has made its last gradient.  On CPUs, where torch's
DistributedDataParallel was no faster so, all gradients go in one message after the pass.
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
"""Bytes of gradients with which a bucket is full, as by default in DistributedDataParallel."""


class _Sum(NamedTuple):
    """The sum of a bucket that is under way."""

    bucket: Sequence[Tensor]
    message: Tensor
    wait: Callable[[], None]


class ClientGradients:
    """The gradients of the trained ``values`` on a rank whose samples are ``share`` of the batch.

    ``group`` are the client's ranks, or None if this rank has all of it.  With ``overlaps`` its
    messages do not wait for those of BN layers, which are those of another group.
    """

    def __init__(
        self, values: Sequence[Tensor], share: float, group: Group, overlaps: bool = False
    ) -> None:
        self._values, self._share, self._group = list(values), share, group
        self._buckets = _buckets(self._values[::-1]) if overlaps else []
        self._sums: list[_Sum] = []
        self._ready: set[int] = set()
        self._came_twice = False

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Sums buckets during the backward passes in the block, if gradients overlap at all."""
        values = self._values if self._buckets else []
        hooks = [value.register_post_accumulate_grad_hook(self._take) for value in values]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, value: Tensor) -> None:
        """Starts the sums of the next buckets if ``value`` was the last that they waited for.

        Buckets go in one order, so that the ranks meet in the same sums.
        """
        self._came_twice |= id(value) in self._ready
        self._ready.add(id(value))
        for bucket in self._buckets[len(self._sums) :]:
            if any(id(each) not in self._ready for each in bucket):
                return
            message = self._part(bucket)
            wait = collectives.start_sum_for_client(message, self._group, "a client's gradients")
            self._sums.append(_Sum(bucket, message, wait))

    def average(self) -> None:
        """Sets the gradients to the client's: the sum over its ranks, weighted by their shares."""
        if self._group is None:
            return
        sums, came_twice = self._sums, self._came_twice
        self._sums, self._ready, self._came_twice = [], set(), False
        for each in sums:
            each.wait()
        if came_twice:  # a part of the model that is computed anew adds to a gradient already sent
            sums = []
        for each in sums:
            unpack(each.message, _gradients(each.bucket))
        done = {id(value) for each in sums for value in each.bucket}
        rest = [value for value in self._values if id(value) not in done]
        if rest:
            message = self._part(rest)
            collectives.sum_for_client(message, self._group, "a client's gradients")
            unpack(message, _gradients(rest))

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
