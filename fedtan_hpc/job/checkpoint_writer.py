"""The callback that saves checkpoints, on every rank.

Each rank writes its private client states at once.  Rank 0 copies everything else and writes it
while the next rounds run.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config.errors import RunError
from ..config.schema import to_dict
from ..distributed import collectives, process_group
from ..evaluation.callbacks import RoundCallback, RunInfo
from ..evaluation.records import RoundRecord
from ..files import atomic_files
from ..runtime.signals import StopRequest
from ..training.cohort import Cohort
from . import checkpoint_format

_SHARD_BYTES = 256 * 2**20


@dataclass
class CheckpointWriter(RoundCallback):
    """Saves the state of ``cohort`` when that is due, and when a signal stops the run."""

    cohort: Cohort
    stop: StopRequest = field(default_factory=StopRequest)
    began: float = field(default_factory=time.perf_counter)
    """When training began by ``time.perf_counter``, interruptions left out."""
    resumed_after: list[int] = field(default_factory=list)
    """Rounds after which the run was resumed."""
    shard_bytes: int = _SHARD_BYTES
    """Largest size of the states in one file."""
    _run: RunInfo = field(init=False)
    _saved: int = field(default=0, init=False)
    """The round after which the state was saved last."""
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _writing: Future[None] | None = field(default=None, init=False)

    def run_began(self, run: RunInfo) -> None:
        """Learns the folder and the options."""
        self._run = run

    def round_ended(self, record: RoundRecord) -> None:
        """Saves if that is due, and before a signal stops the run."""
        every = self._run.config.checkpoint.every
        is_due = every is not None and record.round % every == 0
        is_stopped = self.stop.agreed_signal and record.round < self._run.config.rounds
        if is_due or is_stopped:
            self.save(record.round)
        if is_stopped:
            self.wait()

    def save_last(self, number: int) -> None:
        """Saves the state after the run's last round, from which a later run may go on."""
        if self._run.config.checkpoint.every is not None and self._saved != number:
            self.save(number)
        self.wait()

    def run_failed(self, error: object) -> None:
        """Waits for the checkpoint that is being written, and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    run_ended = run_failed

    def save(self, number: int) -> None:
        """Saves the state after round ``number``; every rank calls it.

        Returns as soon as the values are copied.  Raises ``RunError`` if the states, or what an
        earlier call copied, cannot be written, and on rank 0 if it does not see all states.
        """
        self.wait()
        self._saved = number
        states = self.cohort.states
        shards = self._write_shards(number) if states.exist else []
        if process_group.rank() == 0:  # all that is not in shards is equal on every rank
            self._check_visible(number, shards)
            content = {
                "round": number,
                "seconds": time.perf_counter() - self.began,
                "rng": [torch.get_rng_state()],
                "config": to_dict(self._run.config),
                "resumed_after": self.resumed_after,
                "owners": dict(states.owners),
                "shards": shards,
                **self.cohort.state_dict(),
            }
            self._writing = self._thread.submit(self._write, number, content)

    def wait(self) -> None:
        """Waits until everything is on the disk; raises ``RunError`` if it cannot be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, number: int, content: dict[str, Any]) -> None:
        folder = self._run.run_dir
        path = checkpoint_format.path_of(folder, number)
        try:
            # A checkpoint counts on the lines of the rounds before it: they come first.
            atomic_files.sync(folder / "rounds.jsonl")
            atomic_files.sync(folder)
            checkpoint_format.write(path, content)
            checkpoint_format.remove_all_but(folder, self._run.config.checkpoint.keep)
        except OSError as error:
            raise self._write_error(path, error) from None

    def _write_shards(self, number: int) -> list[dict[str, str]]:
        """Writes this rank's states; returns for each rank the digests of its shards by name."""
        path = checkpoint_format.path_of(self._run.run_dir, number)
        states = self.cohort.states.state_dict()
        clients = list(states)
        state_bytes = max((state.nbytes for state in states.values()), default=0)
        per_shard = max(1, self.shard_bytes // max(1, state_bytes))
        digests: dict[str, str] = {}
        failure = ""
        try:
            for index, start in enumerate(range(0, len(clients), per_shard)):
                shard = checkpoint_format.shard_of(path, process_group.rank(), index)
                chosen = clients[start : start + per_shard]
                content = {"clients": chosen, "states": torch.stack([states[c] for c in chosen])}
                digests[shard.name] = checkpoint_format.write(shard, content)
        except OSError as error:
            failure = str(self._write_error(path, error))
        gathered = collectives.all_gather_object((digests, failure))
        if failures := [each for _, each in gathered if each]:
            raise RunError(failures[0], on_all_ranks=True)
        return [rank_digests for rank_digests, _ in gathered]

    def _check_visible(self, number: int, shards: list[dict[str, str]]) -> None:
        """Raises ``RunError`` unless this rank sees the shards that all ranks have written."""
        folder = checkpoint_format.path_of(self._run.run_dir, number).parent
        deadline = time.monotonic() + 5  # some file systems show files late
        for rank, digests in enumerate(shards):
            for path in (folder / name for name in digests):
                while not path.exists():
                    if time.monotonic() > deadline:
                        why = "run_dir must be on a file system that all ranks share"
                        message = f"rank {rank}'s {path} is not visible to rank 0: {why}"
                        raise RunError(message, on_all_ranks=False)
                    time.sleep(0.1)

    def _write_error(self, path: Path, error: OSError) -> RunError:
        whole = checkpoint_format.existing(self._run.run_dir)
        last = f"the last whole checkpoint is {whole[0]}" if whole else "there is no earlier one"
        message = f"rank {process_group.rank()}: cannot write {path}: {error.strerror or error}"
        return RunError(f"{message}; {last}", on_all_ranks=False)
