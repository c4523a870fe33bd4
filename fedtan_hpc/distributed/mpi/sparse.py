"""The sum of sparse tensors over ranks, each of which holds other entries."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_sparse(tensor: Tensor, operation: Any, gather: Callable[[Tensor], Tensor]) -> None:
    """Overwrites ``tensor``, sparse COO, with its sum over ranks; waits for all ranks.

    ``gather`` returns the tensors of all ranks, of one shape, stacked by rank.  Raises
    ``ValueError`` for other reductions than the sum, and on ranks whose tensor is dense.
    """
    if operation != dist.ReduceOp.SUM or not tensor.is_sparse:
        raise ValueError("sparse tensors are summed only, and not together with dense ones")
    entries = tensor.detach().coalesce()
    indices, values = entries.indices().t().contiguous(), entries.values()
    counts = gather(torch.tensor([len(values)])).flatten().tolist()
    all_indices, all_values = (
        torch.cat([rows[:count] for rows, count in zip(gather(padded), counts, strict=True)])
        for padded in (_padded(indices, max(counts)), _padded(values, max(counts)))
    )
    total = torch.sparse_coo_tensor(
        all_indices.t(), all_values, tensor.shape, check_invariants=False
    )
    with torch.no_grad():  # detach() would give a tensor with entries of its own
        tensor.copy_(total.coalesce())


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
