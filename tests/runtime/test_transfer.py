"""Copies to a device, cached constants, and checks that are read together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedtan_hpc.batchnorm.statistics_call import GlobalStatistics
from fedtan_hpc.distributed import collectives
from fedtan_hpc.runtime import transfer

CPU = torch.device("cpu")


def test_a_constant_is_made_once() -> None:
    first = transfer.constant((1.0, 2.5), torch.float64, CPU)
    assert first is transfer.constant((1.0, 2.5), torch.float64, CPU)
    assert first.tolist() == [1.0, 2.5]
    assert transfer.constant((1.0, 2.5), torch.float32, CPU).dtype is torch.float32


def test_a_constant_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        made = transfer.constant((3.0, 7.0, 11.0), torch.float32, CPU)
    values = torch.ones(3, requires_grad=True)
    (values * made).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3.0, 7.0, 11.0]


def test_a_copy_to_a_gpu_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor subclass stands in for memory and GPU, and records the calls of torch in order."""
    calls: list[object] = []

    class Recording(torch.Tensor):
        def pin_memory(self, device: object = None) -> torch.Tensor:
            calls.append("pinned")
            return self

        def to(self, *args: object, **kwargs: object) -> torch.Tensor:
            calls.append((args, kwargs))
            return self

    transfer.send(torch.ones(2).as_subclass(Recording), torch.device("cuda", 0))
    assert calls == ["pinned", ((torch.device("cuda", 0),), {"non_blocking": True})]


def test_postponed_checks_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they are postponed to the end of the context."""
    to_cpu, reads, headers = collectives.to_cpu, [], list[Sequence[float]]()

    def counted(message: torch.Tensor) -> torch.Tensor:
        reads.append(message.shape)
        return to_cpu(message)

    monkeypatch.setattr(collectives, "to_cpu", counted)
    statistics = GlobalStatistics([1.0], None, ["a", "b"])
    for header in ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]):
        check = (torch.tensor(header), headers.append)
        statistics._unverified.append(check)
    statistics.close()
    assert headers == [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    assert reads == [(2, 4)]


def test_tensors_of_all_kinds_are_copied() -> None:
    image = torch.randn(2, 3, 4, 5)
    sources = [image, torch.tensor(3), torch.randn(4), image.double()]
    channels_last = torch.zeros_like(image).to(memory_format=torch.channels_last)
    targets = [channels_last, torch.tensor(0), torch.zeros(4), torch.zeros_like(image)]
    transfer.copy_all(targets, sources)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(target.dtype))
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="shorter"):
        transfer.copy_all(targets, sources[:3])
