"""Operations of MPI in flight, as torch's Work: started at once, finished when waited for.

``mpi.process_group`` returns one from each of its methods.
"""

import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from . import waiting
from .agreement import Agreement
from .buffers import MPIBuffer
from .library import MPI

_Work: Any = dist.Work
_PAUSE_SECONDS = 5e-5
"""Time between two looks of the thread that completes futures."""


class CompletedWork(_Work):  # type: ignore[misc]
    """The Work of an operation that has ended with ``result``."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Returns True."""
        return True

    synchronize = is_completed = is_success = wait

    def result(self) -> Any:
        """Returns the tensors that the operation has written to."""
        return self._result

    def get_future(self) -> "Future[Any]":
        """Returns a completed future of the result."""
        future: Future[Any] = Future()
        future.set_result(self._result)
        return future


class ProfilerEvent:
    """An operation as torch's profiler shows it, from its start until MPI is done."""

    def __init__(self, name: str, tensors: list[Any]) -> None:
        event: Any = torch._C._profiler._RecordFunctionFast(name, tensors, {})
        event.__enter__()
        self._open = [event]

    def end(self) -> None:
        """Ends the event in another thread, by which the profiler tells that it is asynchronous.

        The event ends when its object does: torch would note a second end in this thread.
        """
        ending = threading.Thread(target=self._open.clear)
        ending.start()
        ending.join()


class MPIWork(_Work):  # type: ignore[misc]
    """The requests of one call, its result, and what is to be done once MPI is done.

    ``wait`` raises ``DistBackendError`` if MPI reports a mistake, as it does for ranks that give
    tensors of different sizes, and if the operation takes longer than ``seconds``.
    """

    def __init__(self, title: str, seconds: float, event: ProfilerEvent | None = None) -> None:
        super().__init__()
        self._title = title
        self._deadline, self._seconds = time.monotonic() + seconds, seconds
        self._status = MPI.Status()
        self._lock = threading.Lock()  # a thread that completes futures looks too
        self._future: Future[Any] | None = None
        self._unsettled: Future[Any] | None = None
        self._error: Exception | None = None
        self._is_done = False
        self._result: Any = None
        self._requests: list[MPI.Request] = []
        self._buffers: list[MPIBuffer] = []
        self._finish: list[Callable[[], object]] = []
        self._event = event
        self._agreement: Agreement | None = None

    def needs_agreement(self, agreement: Agreement) -> None:
        """Lets the work fail once ranks turn out to call it in different ways."""
        self._agreement = agreement

    def reads(self, tensor: Tensor, reduces: bool = False) -> Any:
        """Returns the memory of ``tensor`` for MPI to read until the operation is done."""
        self._buffers.append(MPIBuffer(tensor, reduces))
        return self._buffers[-1].memory

    def writes(self, tensor: Tensor, reduces: bool = False) -> Any:
        """Returns the memory of ``tensor`` for MPI to write until the operation is done."""
        memory = self.reads(tensor, reduces)
        self.then(self._buffers[-1].write_back)
        return memory

    def then(self, action: Callable[[], object]) -> None:
        """Calls ``action`` once MPI is done, before the result can be read."""
        self._finish.append(action)

    def start(self, operation: Callable[..., MPI.Request], *arguments: Any, **options: Any) -> None:
        """Starts an operation of MPI that is part of this work."""
        try:
            self._requests.append(operation(*arguments, **options))
        except MPI.Exception as error:
            raise failed(self._title, error) from None

    def returns(self, result: Any) -> "MPIWork":
        """Sets what ``result`` and the future return; returns the work itself, all started."""
        self._result = result
        _in_flight.add(self)
        return self

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Waits for ``timeout``, or as long as the operation may take; returns True."""
        deadline, seconds = self._deadline, self._seconds
        if timeout is not None and timeout > timedelta(0):
            seconds = timeout.total_seconds()
            deadline = time.monotonic() + seconds
        if not waiting.wait_until(self.is_completed, deadline):
            self._fail(_noted(waiting.timeout_message(self._title, seconds)))
        if self._error is not None:
            raise self._error
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        """Returns whether the operation has ended, well or not; never waits."""
        if self._is_done:
            return True
        with self._lock:
            if not self._is_done:
                try:
                    self._is_done = self._has_ended()
                except Exception as error:
                    self._end_with(failed(self._title, error))
        if self._is_done:
            self._settle()
        return self._is_done

    def _has_ended(self) -> bool:
        if self._agreement is not None:
            if not self._agreement.is_reached():
                return False
            self._agreement = None
        while self._requests and self._requests[-1].Test(self._status):
            self._requests.pop()
        if self._requests:
            return False
        for action in self._finish:
            action()
        return True

    def _fail(self, error: Exception) -> None:
        with self._lock:
            if not self._is_done:
                self._end_with(error)
        self._settle()

    def _end_with(self, error: Exception) -> None:
        # MPI may still write to the buffers, so these stay for good.
        _lost.append((self._requests, self._buffers, self._agreement))
        self._error, self._is_done = error, True

    def _settle(self) -> None:
        """Frees what the operation used and completes the future; without the lock, as callbacks
        of the future may call this work."""
        _in_flight.discard(self)
        with self._lock:
            self._buffers, self._finish = [], []
            future, self._unsettled = self._unsettled, None
            event, self._event = self._event, None
        if event is not None:
            event.end()
        if future is not None and self._error is None:
            future.set_result(self._result)
        elif future is not None:
            future.set_exception(self._error)

    def get_future(self) -> "Future[Any]":
        """Returns a future of the result; a thread completes it if nobody waits for the work."""
        if self._future is None:
            self._future = self._unsettled = Future()
            if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
                self.wait()
            if self.is_completed():
                self._settle()
            else:
                _complete_in_thread(self)
        return self._future

    def has_expired(self) -> bool:
        """Ends the work with an error if it has taken too long; returns whether it has ended."""
        if not self.is_completed() and time.monotonic() > self._deadline:
            self._fail(_noted(waiting.timeout_message(self._title, self._seconds)))
        return self._is_done

    def is_success(self) -> bool:
        """Returns whether the operation has ended without an error."""
        return self.is_completed() and self._error is None

    def exception(self) -> Exception | None:
        """Returns the error with which the operation has ended."""
        return self._error

    def result(self) -> Any:
        """Returns the tensors that the operation writes to; valid after ``wait``."""
        return self._result

    def source_rank(self) -> int:
        """Returns the rank in the group that sent what was received."""
        return int(self._status.source)

    _source_rank = source_rank


_in_flight: set[MPIWork] = set()
"""Also works that the caller has dropped: MPI still reads or writes their memory."""
_lost: list[Any] = []
_with_futures: "queue.SimpleQueue[MPIWork]" = queue.SimpleQueue()
_threads: list[threading.Thread] = []


def look_at_all() -> int:
    """Finishes what has ended among works that nobody waits for; returns how many go on."""
    for work in list(_in_flight):
        work.is_completed()
    return len(_in_flight)


def failed(title: str, error: object) -> Exception:
    """Returns the error of an operation, and lets this process end the others when it ends."""
    hint = "; do all ranks call the same operation, with tensors of the same size?"
    return _noted(f"{title} over MPI: {error}{hint if isinstance(error, MPI.Exception) else ''}")


def _noted(message: str) -> Exception:
    waiting.note_failure(message)
    return dist.DistBackendError(message)


def _complete_in_thread(work: MPIWork) -> None:
    if not _threads:
        _threads.append(threading.Thread(target=_complete_futures, daemon=True))
        _threads[0].start()
    _with_futures.put(work)


def _complete_futures() -> None:
    works: list[MPIWork] = []
    while True:
        while not works or not _with_futures.empty():
            works.append(_with_futures.get())
        works = [work for work in works if not work.has_expired()]
        time.sleep(_PAUSE_SECONDS)
