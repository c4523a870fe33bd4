"""When training is saved, and what of it; rank 0 writes while the next rounds go on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.errors import RunError
from ..config.schema import CheckpointConfig
from ..distributed import collectives, process_group
from ..runtime import atomic_files
from ..training.client_state import PrivateStates
from ..training.cohort import Cohort
from . import checkpoint_format

_ONE_FILE = 256 * 2**20
"""Bytes of clients' states, of all or in one file; above it each rank writes its own."""


@dataclass
class CheckpointWriter:
    """Saves a run in ``folder``; every rank calls the same methods in the same rounds."""

    folder: Path
    config: CheckpointConfig
    facts: dict[str, Any]
    """What a checkpoint says of its run: its configuration, and earlier resumptions."""
    began: float = field(default_factory=time.perf_counter)
    """When training began, on the clock of ``time.perf_counter``, interruptions left out."""
    one_file_bytes: int = _ONE_FILE
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _writing: Future[None] | None = None

    def is_due(self, number: int) -> bool:
        """Whether training is saved after this round in any case."""
        return self.config.every is not None and number % self.config.every == 0

    def save(self, number: int, cohort: Cohort) -> None:
        """Save training as it is after round ``number``.

        Returns as soon as the values are copied.  Raises ``RunError`` on rank 0 if they, or those
        before, cannot be written.
        """
        self.wait()
        states = self._states(number, cohort.states)
        if process_group.rank() == 0:  # all else is the same on every rank
            content = {
                "round": number,
                "seconds": time.perf_counter() - self.began,
                "rng": [torch.get_rng_state()],
                **self.facts,
                **cohort.memory(),
                **states,
            }
            self._writing = self._writer.submit(self._write, number, content)

    def wait(self) -> None:
        """Until all is on the disk; raises ``RunError`` if it is not."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """The same, at the end."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _write(self, number: int, content: dict[str, Any]) -> None:
        path = checkpoint_format.path_of(self.folder, number)
        try:
            # A checkpoint stands for the rounds before it: their lines come first.
            atomic_files.sync(self.folder / "rounds.jsonl")
            atomic_files.sync(self.folder)
            checkpoint_format.write(path, content)
            checkpoint_format.remove_all_but(self.folder, self.config.keep)
        except OSError as error:
            raise self._not_written(path, error) from None

    def _not_written(self, path: Path, error: OSError) -> RunError:
        left = checkpoint_format.existing(self.folder)
        last = f"the last whole checkpoint is {left[0]}" if left else "there is none before it"
        why = error.strerror or error
        return RunError(f"rank {process_group.rank()}: cannot write {path}: {why}; {last}", False)

    def _states(self, number: int, states: PrivateStates) -> dict[str, Any]:
        """What clients keep: in the file itself, or in files that the ranks write now."""
        owners = states.owners()
        if states.state_bytes() * len(owners) <= self.one_file_bytes:
            clients, states_KD = _gathered(states)
            return {"owners": owners, "clients": clients, "states": states_KD, "shards": {}}
        shards = self._write_shards(number, states)
        return {"owners": owners, "clients": [], "states": torch.empty(0), "shards": shards}

    def _write_shards(self, number: int, states: PrivateStates) -> dict[str, str]:
        """This rank's states in files of their own; the digests of all ranks' files by name."""
        path = checkpoint_format.path_of(self.folder, number)
        clients, states_KD = states.memory()
        rows = max(1, self.one_file_bytes // max(1, states.state_bytes()))
        written: dict[str, str] = {}
        failure = ""
        try:
            for index, start in enumerate(range(0, len(clients), rows)):
                shard = checkpoint_format.shard_of(path, process_group.rank(), index)
                part = slice(start, start + rows)
                content = {"clients": clients[part], "states": states_KD[part].clone()}
                written[shard.name] = checkpoint_format.write(shard, content)
        except OSError as error:
            failure = str(self._not_written(path, error))
        found = collectives.all_gather_object((written, failure))
        if failures := [each for _, each in found if each]:
            raise RunError(failures[0], on_all_ranks=True)
        return {name: digest for shards, _ in found for name, digest in shards.items()}


def _gathered(states: PrivateStates) -> tuple[list[int], Tensor]:
    """All ranks' states on rank 0, by client, (K, D); each rank sends one message."""
    owners = states.owners()
    held = [sorted(c for c in owners if owners[c] == r) for r in range(process_group.world_size())]
    clients, states_KD = states.memory()
    assert clients == held[process_group.rank()], "every rank knows where the states are"
    if not owners:
        return clients, states_KD
    message = states_KD.new_zeros(max(map(len, held)), states_KD.shape[1])
    message[: len(clients)] = states_KD
    parts = collectives.gather_to_first(states.on_device(message))
    rows = [collectives.to_cpu(part[: len(own)]) for part, own in zip(parts, held, strict=False)]
    return [client for own in held for client in own], torch.cat([*rows, states_KD[:0]])
