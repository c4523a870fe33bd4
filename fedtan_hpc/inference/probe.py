"""Probes the model of a finished run on batches of its clients; nothing is trained.

``tools/probe.py`` uses it, on one rank or several.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.algorithms import ALGORITHMS
from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config
from ..config.validate import check
from ..config.validation.training import can_be_probed
from ..data import download
from ..distributed import collectives, process_group
from ..distributed.model_average import model_tensors
from ..evaluation.probe_records import ProbeRecord
from ..job.callbacks import as_run_error
from ..job.context import RunContext
from ..job.setup import prepare
from ..job.trainer import Trainer
from ..models.parameter_groups import TensorFilter, pack
from ..runtime.device import tensor_float
from . import saved_run
from .saved_run import SavedRun


def options(run: SavedRun, out: Path, changed: Mapping[str, Any]) -> Config:
    """Returns the options of ``run`` with the ``changed`` ones, for a probe that writes to ``out``.

    Raises ``ConfigError`` if the run's method has no statistics of batches, or for wrong values.
    """
    saved = run.config
    if not can_be_probed(saved):
        norm = saved.model.norm or ALGORITHMS[saved.algorithm.name].norm
        found = f"this one has algorithm={saved.algorithm.name}, norm {norm}"
        allowed = "a run whose BN layers normalise by statistics of batches, which a probe compares"
        remedy = f"{found}: choose one of fedavg, fedbn, silobn, fedtan, centralised or singleset"
        raise ConfigError(format_option_error("run_dir", run.folder, allowed, remedy))
    config = replace(
        saved,
        model=replace(saved.model, weights=None),  # model.pt has the values
        run_dir=str(out),  # where a failure is noted
        compile=False,
        ranks_per_client=1,
        callbacks=[],
        resume="auto",
        resume_change=[],
        **changed,
    )
    check(config)
    return config


def records(run: SavedRun, config: Config, batches: int, best: bool) -> Iterator[ProbeRecord]:
    """Yields a record for each of ``batches`` rounds after the last one, of their first batches.

    Every rank calls it and gets the same; ``config`` comes from ``options``.  Raises
    ``ConfigError`` if a file of the run or its data cannot be used, and ``RunError`` if a pass
    fails.
    """
    context = RunContext.of(config, time.perf_counter())
    torch.set_num_threads(context.placement.threads)
    if context.rank_info.local_rank == 0:
        download.fetch(config.data)
    first = int(run.summary["rounds"]) + 1
    with context.process_group(), tensor_float(config.tf32):
        trainer = prepare(config, context.placement)
        try:
            _load(run, trainer, best)
            for number in range(first, first + batches):
                with as_run_error():
                    record = trainer.probe_round(number)
                yield record
        finally:
            trainer.store.close()


def _load(run: SavedRun, trainer: Trainer, best: bool) -> None:
    """Gives the trainer the saved model, and the clients what they have kept."""
    model, states = trainer.model, trainer.cohort.states
    saved_run.load_state(run, model, saved_run.saved_state(run, best))
    collectives.broadcast_tensors(model_tensors(model))
    if not states.exist:
        return
    states.begin_with(model)
    tensors = TensorFilter(model, states.parts)(model)
    ranks = process_group.world_size()
    kept_by = saved_run.client_states(run)
    mine = {}
    for client, kept in kept_by.items():
        saved_run.check_kept(run, tensors, kept)
        if missing := tensors.keys() - kept.keys():
            raise saved_run.misfit(run.folder / "clients.pt", f"no {min(missing)} of a client")
        if client % ranks == process_group.rank():
            mine[client] = pack([kept[name] for name in tensors])
    states.load_state_dict(mine, {client: client % ranks for client in kept_by})
