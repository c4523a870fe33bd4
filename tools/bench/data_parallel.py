"""torch's own way to the pooled gradient: SyncBatchNorm and DistributedDataParallel.

Every step is synchronised, statistics and gradients: FedTAN with one local step does as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import rounds
from fedtan_hpc.config.schema import Config


class DataParallelRound:
    """E steps of all ranks on their clients' samples, for timing.

    DistributedDataParallel belongs to a process group: ``begin`` is called whenever one has
    started.  SyncBatchNorm takes several ranks' tensors on a GPU only.
    """

    def __init__(self, config: Config, where: Any) -> None:
        import torch
        from torch import nn

        from fedtan_hpc.models import factory

        facts = config.data.facts()
        model = factory.build(config.model, facts.shape, facts.classes, seed=0)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model).to(where).train()
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self._config, self._where = config, where
        self._samples = rounds.samples(config, where)
        self._steps: Callable[[], None] | None = None

    def begin(self) -> None:
        """Make ready in the process group that there is now; one round warms up."""
        from torch.nn.parallel import DistributedDataParallel

        on = [self._where] if self._where.type == "cuda" else None
        parallel = DistributedDataParallel(self.model, device_ids=on)
        self._steps = rounds.plain(self._config, parallel, self._samples)
        self._steps()

    def __call__(self) -> None:
        """The round; ``begin`` was called."""
        assert self._steps is not None
        self._steps()
