"""A round of a rank with one client, for timing: random samples of the data set's shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fedtan_hpc.config.schema import Config


def samples(config: Config, where: Any) -> Any:
    """This rank's client's: enough for a round without a repetition."""
    import torch

    from fedtan_hpc.data.batching import Samples
    from fedtan_hpc.distributed import process_group

    facts, size = config.data.facts(), config.batch_size * config.local_steps
    generator = torch.Generator().manual_seed(process_group.rank())
    inputs = torch.randn(size, *facts.shape, generator=generator)
    labels = torch.randint(0, facts.classes, (size,), generator=generator)
    return Samples(inputs, labels).to(where)


def one_client(config: Config, where: Any) -> Callable[[], object]:
    """The job's round on the device ``where``: local steps, statistics and average.

    Without a process group a rank trains by itself, and nothing is sent.
    """
    import torch

    from fedtan_hpc.config.algorithms import plan
    from fedtan_hpc.data.client_store import Client
    from fedtan_hpc.distributed import process_group
    from fedtan_hpc.job.setup import DTYPES, host, network
    from fedtan_hpc.training.local_training import RoundContext

    facts = config.data.facts()
    model = network(config, facts.shape, facts.classes).to(where, DTYPES[config.precision])
    own = samples(config, where)
    batch = own[torch.arange(config.batch_size, device=own.labels.device)]
    cohort = host(config, model, own[:1], one_client_per_rank=True, example=batch)
    now = RoundContext(1, config.optimizer.lr, plan(config, 1))

    def run() -> object:
        return cohort.train(
            [Client(process_group.rank(), 1 / process_group.world_size(), own)], now
        )

    return run


def plain(config: Config, model: Any, data: Any) -> Callable[[], None]:
    """Local steps of ``model`` as one writes them: torch's own SGD, made for the round."""
    import torch
    from torch.nn.functional import cross_entropy

    options = config.optimizer

    def run() -> None:
        order = torch.randperm(len(data), device=data.labels.device).split(config.batch_size)
        optimizer = torch.optim.SGD(
            model.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
        )
        for batch in order:
            optimizer.zero_grad()
            cross_entropy(model(data.inputs[batch]), data.labels[batch]).backward()
            optimizer.step()

    return run


def seconds(run: Callable[[], object], where: Any) -> float:
    """From a common start to the end of the slowest rank."""
    import torch

    from fedtan_hpc.distributed import collectives, process_group

    process_group.barrier()
    start = time.perf_counter()
    run()
    if where.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=where)
    return float(collectives.max_over_ranks(took))
