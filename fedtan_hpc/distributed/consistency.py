"""The check that all ranks hold the same model, bit by bit; the trainer calls it."""

import hashlib

import torch
from torch import nn

from . import collectives
from .model_average import named_tensors


@torch.no_grad()
def ranks_that_differ(module: nn.Module) -> list[int]:
    """Returns the ranks whose model differs from that of rank 0, in the same list on every rank.

    Compares names, dtypes, shapes and bytes of all parameters and buffers by a SHA-256 digest, in
    one gather.  The list is empty if all ranks agree.
    """
    tensors = named_tensors(module)
    if not tensors:
        return []
    sha256 = hashlib.sha256()
    for name, tensor in tensors.items():
        value = collectives.to_cpu(tensor.detach()).resolve_conj().resolve_neg().contiguous()
        sha256.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha256.update(value.reshape(-1).view(torch.uint8).numpy().data)
    device = next(iter(tensors.values())).device
    digest = torch.tensor(list(sha256.digest()), dtype=torch.uint8, device=device)
    gathered = collectives.to_cpu(torch.stack(collectives.all_gather(digest)))
    return [rank for rank, other in enumerate(gathered) if not torch.equal(other, gathered[0])]
