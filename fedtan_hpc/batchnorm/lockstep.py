"""Several clients of one rank, layer by layer side by side: one thread each, one running at a time.

Each client's forward and backward pass is the ordinary one.  Where it needs the other clients'
statistics it leaves its message and lets the next client run; the last one sends the sum of all
messages, and each goes on with the answer.  Clients may have batches of any size, and the order
of the collectives is that of a single client, whatever the number of clients.

On a GPU torch would run all backward passes in one thread, which cannot wait for itself: the
clients' threads are told to run their own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_UNLIKE = "the clients of one rank did not run the same layers"


class Lockstep(Generic[Result]):
    """Runs functions together, which meet in ``exchange``; ``send`` adds up what they bring."""

    def __init__(
        self, functions: Sequence[Callable[[], Result]], send: Callable[[list[Tensor]], Tensor]
    ) -> None:
        self._functions = functions
        self._send = send
        self._turns = [threading.Semaphore(0) for _ in functions]
        self._done = threading.Semaphore(0)
        self._lane_of_thread = threading.local()
        self._brought: list[Tensor] = []
        self._answer: Tensor | None = None
        self._results: dict[int, Result] = {}
        self._error: BaseException | None = None

    def run(self) -> list[Result]:
        """Results of all functions, in order; the first error of any of them is raised."""
        modes, number = _Modes(), len(self._functions)
        threads = [_idle_thread() for _ in range(number)]
        for client_index, thread in enumerate(threads):
            thread.work.put(partial(self._run_lane, client_index, modes))
        self._turns[0].release()
        self._done.acquire()
        for thread in threads:
            thread.done.acquire()
        _idle.extend(threads)
        if self._error is not None:
            raise self._error
        return [self._results[client_index] for client_index in range(len(self._functions))]

    def exchange(self, message: Tensor) -> Tensor:
        """Called by every function at the same points: the answer to all their messages."""
        client_index: int = self._lane_of_thread.number
        if client_index != len(self._brought) or self._results:
            raise RuntimeError(_UNLIKE)
        self._brought.append(message)
        if client_index == len(self._functions) - 1:
            self._answer = self._send(self._brought)
            self._brought = []
        self._hand_over(client_index)
        assert self._answer is not None
        return self._answer

    def _hand_over(self, client_index: int) -> None:
        """Let the next client run, and wait for the turn to come round.

        Each client goes on in its own sequence of random numbers.
        """
        random = _random_states()
        self._turns[(client_index + 1) % len(self._turns)].release()
        self._turns[client_index].acquire()
        for generator, state in random:
            generator.set_state(state)
        if self._error is not None:
            raise _OtherFailed

    def _run_lane(self, client_index: int, modes: _Modes) -> None:
        self._lane_of_thread.number = client_index
        self._turns[client_index].acquire()
        try:
            if self._error is None:
                with modes.again():
                    self._results[client_index] = self._functions[client_index]()
        except _OtherFailed:
            pass
        except BaseException as error:
            self._error = error
        if client_index < len(self._functions) - 1:
            self._turns[client_index + 1].release()
            return
        if self._error is None and len(self._results) < len(self._functions):
            self._error = RuntimeError(_UNLIKE)
        for turn in self._turns:  # after an error some may still wait for theirs
            turn.release()
        self._done.release()


class _Thread:
    """A thread that is kept for later steps: a new one would touch fresh memory in each of them."""

    def __init__(self) -> None:
        self.work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.done = threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.work.get()()
            self.done.release()


_idle: list[_Thread] = []
os.register_at_fork(after_in_child=_idle.clear)  # a child process has no threads but its own


def _idle_thread() -> _Thread:
    """One that is kept, or a new one."""
    try:
        return _idle.pop()  # two threads of the caller's may both run clients
    except IndexError:
        return _Thread()


def _random_states() -> list[tuple[torch.Generator, Tensor]]:
    """Of the CPU, and of the GPU that the calling thread uses."""
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return [(generator, generator.get_state()) for generator in generators]


class _Modes:
    """What other threads do not inherit of the calling one."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._grad = torch.is_grad_enabled()
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in ("cpu", *(() if self._gpu is None else ("cuda",)))
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same GPU, gradient mode, autocast and number of threads in this thread."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._grad))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled))
            yield


class _OtherFailed(Exception):
    """Another client of this rank failed; this one ends too."""
