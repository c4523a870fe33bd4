"""Several clients of one rank, layer by layer: one thread each, of which one runs at a time.

Each client's forward and backward pass is the ordinary one.  Where a client needs the other
clients' statistics, it leaves its message and lets the next client run.  The last client sends the
sum of all messages, and each client continues with the answer.  Clients may have batches of any
size; the collectives and their order are those of a single client.  ``batchnorm`` uses it.

On a GPU torch would run all backward passes in one thread, which cannot wait for itself; the
clients' threads are told to run their backward passes themselves.
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

from ..runtime.global_random import GlobalStates
from .different_calls import ON_ONE_RANK

Result = TypeVar("Result")


class Lockstep(Generic[Result]):
    """Runs functions together, which meet in ``exchange``; ``send`` adds up their messages."""

    def __init__(
        self, functions: Sequence[Callable[[], Result]], send: Callable[[list[Tensor]], Tensor]
    ) -> None:
        self._functions = functions
        self._send = send
        self._turns = [threading.Semaphore(0) for _ in functions]
        self._done = threading.Semaphore(0)
        self._of_thread = threading.local()
        self._messages: list[Tensor] = []
        self._answer: Tensor | None = None
        self._results: dict[int, Result] = {}
        self._error: BaseException | None = None

    def run(self) -> list[Result]:
        """Returns the results of all functions, in order; raises the first error of any."""
        modes = _Modes()
        threads = [_idle_thread() for _ in self._functions]
        for client_index, thread in enumerate(threads):
            thread.work.put(partial(self._run_client, client_index, modes))
        self._turns[0].release()
        self._done.acquire()
        for thread in threads:
            thread.done.acquire()
        _idle.extend(threads)
        if self._error is not None:
            raise self._error
        return [self._results[client_index] for client_index in range(len(self._functions))]

    def exchange(self, message: Tensor) -> Tensor:
        """Returns the answer to all functions' messages; each function calls it equally often."""
        client_index: int = self._of_thread.client_index
        if client_index != len(self._messages) or self._results:
            raise RuntimeError(ON_ONE_RANK)
        self._messages.append(message)
        if client_index == len(self._functions) - 1:
            self._answer = self._send(self._messages)
            self._messages = []
        self._let_others_run(client_index)
        assert self._answer is not None
        return self._answer

    def _let_others_run(self, client_index: int) -> None:
        """Wakes the next client and waits until this one's turn comes again.

        Each client continues in its sequence of random numbers.
        """
        states = GlobalStates.get()
        self._turns[(client_index + 1) % len(self._turns)].release()
        self._turns[client_index].acquire()
        states.set()
        if self._error is not None:
            raise _OtherClientFailed

    def _run_client(self, client_index: int, modes: _Modes) -> None:
        self._of_thread.client_index = client_index
        self._turns[client_index].acquire()
        try:
            if self._error is None:
                with modes.restored():
                    self._results[client_index] = self._functions[client_index]()
        except _OtherClientFailed:
            pass
        except BaseException as error:
            self._error = error
        if client_index < len(self._functions) - 1:
            self._turns[client_index + 1].release()
            return
        if self._error is None and len(self._results) < len(self._functions):
            self._error = RuntimeError(ON_ONE_RANK)
        for turn in self._turns:  # after an error some clients may still wait
            turn.release()
        self._done.release()


class _Thread:
    """A thread that later steps use again: a new one would touch fresh memory in each of them."""

    def __init__(self) -> None:
        self.work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.done = threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.work.get()()
            self.done.release()


_idle: list[_Thread] = []
os.register_at_fork(after_in_child=_idle.clear)  # threads do not survive a fork


def _idle_thread() -> _Thread:
    try:
        return _idle.pop()  # in one step: two threads of the caller may both run clients
    except IndexError:
        return _Thread()


class _Modes:
    """The calling thread's modes, which other threads do not inherit."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._grad = torch.is_grad_enabled()
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in ("cpu", *(() if self._gpu is None else ("cuda",)))
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Sets GPU, gradient mode, autocast and number of threads in the current thread."""
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


class _OtherClientFailed(Exception):
    """Another client of this rank failed; this one ends too."""
