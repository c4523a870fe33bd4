"""A client's own sums of the backward pass, as a CPU's kernel and a GPU's give them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fedtan_hpc.batchnorm import local_kernels

EPS = 1e-5


@pytest.fixture
def gpu_kernel() -> Iterator[None]:
    """On the CPU, by plain operations, as the kernel's source has it: means and r are given.

    It has no values of its own to fall back to, and makes nothing that is not asked for.
    """

    def reduce(
        g: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        input_g: bool,
        weight_g: bool,
        bias_g: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert weight is not None or not (weight_g or bias_g)
        assert g.dtype is x.dtype
        assert mean.dtype is invstd.dtype is local_kernels.statistics_dtype(x)
        others = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide, none = g.to(mean.dtype), g.new_empty(0)
        of_deviation = (wide * (x - mean.view(shape))).sum(others)
        sums = (wide.sum(others), of_deviation) if input_g else (none, none)
        weight_sum = of_deviation * invstd if weight_g else none
        return *sums, weight_sum, wide.sum(others) if bias_g else none

    library = torch.library.Library("aten", "IMPL")
    library.impl("batch_norm_backward_reduce", reduce, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("shape", [(8, 6), (4, 6, 5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("gpu_kernel")
def test_a_gpus_kernel_gives_the_same_sums(
    dtype: torch.dtype, shape: tuple[int, ...], clients: int
) -> None:
    torch.manual_seed(0)
    x, g = (torch.randn(shape).to(dtype) for _ in range(2))
    counts = [x.numel() // x.size(1)] * clients
    mean, variance = (each.flatten() for each in local_kernels.local_moments(x, None, counts))
    r = (variance + EPS).rsqrt()
    on_cpu = local_kernels.local_sums(g, x, mean, r, clients)
    on_gpu = local_kernels._sums_on_gpu(g, x, mean, r)
    others = [dim for dim in range(x.dim()) if dim != 1]
    as_written = g.double().sum(others).view(clients, -1)
    torch.testing.assert_close(on_cpu[0].double(), as_written, rtol=1e-4, atol=1e-4)
    for found, sums in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(found.view(clients, -1), sums, rtol=1e-4, atol=1e-4)
