"""Worker processes that make batches, each behind a pipe of its own: one that dies is known at once, and blocks no other."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.util import Finalize, get_temp_dir
from typing import Any, NamedTuple

import torch

from .errors import shown
from .plan import Plan
from .reader import ClipReader, Result

_PARENT_SECONDS = 5.0  # between looks whether it is still there
_CLOSE_SECONDS = 1.0  # for a worker to end by itself


class Stalled(Exception):
    """No worker has given anything for the time allowed."""


class Task(NamedTuple):
    """Batch ``number`` of an epoch, asked for by the pool's ``iteration``-th iteration. Small: a pipe must never be full."""

    iteration: int
    epoch: int
    number: int


class Failure(NamedTuple):
    """What went wrong in a worker, other than a video."""

    error: Exception
    text: str


@dataclass
class Worker:
    process: Any
    connection: Connection
    tasks: deque[Task] = field(default_factory=deque)  # not answered yet


class Pool:
    """Workers that live from the first iteration on, until the pool is dropped or one of them dies.

    Args:
        prefetch: batches each worker prepares ahead.
        context: how workers start, see `multiprocessing.get_context`.
        stall: seconds without anything from a worker that are `Stalled`; 0: none.
        finish: called with each result in a thread of this process, ahead of its being asked for.
    """

    def __init__(
        self,
        reader: ClipReader,
        plan: Plan,
        workers: int,
        prefetch: int,
        context: str | BaseContext | None,
        stall: float,
        finish: Callable[[Result], Result] | None = None,
    ) -> None:
        self._reader, self._plan, self._count, self._prefetch = reader, plan, workers, prefetch
        self._context: Any = context if isinstance(context, BaseContext) else multiprocessing.get_context(context)
        self._stall, self._finish, self._iteration = stall or None, finish, 0
        self._workers: list[Worker] = []
        self._finisher: ThreadPoolExecutor | None = None
        # At exit before multiprocessing itself would wait for them.
        Finalize(self, _end, (self._workers,), exitpriority=10)

    def results(self, epoch: int, start: int) -> Iterator[Result]:
        """Batches ``start``, ``start + 1``, ... of an epoch; those of an earlier iteration are forgotten.

        Raises:
            RuntimeError: a worker died, while this iteration ran or since the last one. The next has new workers.
            Stalled: see above. What else a worker raised, with its traceback.
        """
        self._iteration += 1
        if any(not worker.process.is_alive() for worker in self._workers):
            self.close()  # of no consequence while nothing was asked of it
        if not self._workers:
            self._start()
        numbers = iter(range(start, len(self._plan)))
        for _ in range(self._count * self._prefetch):
            self._ask(epoch, next(numbers, None))
        return self._results(epoch, start, numbers, self._iteration)

    def _results(self, epoch: int, start: int, numbers: Iterator[int], iteration: int) -> Iterator[Result]:
        done: dict[int, Result | Future[Result]] = {}
        for number in range(start, len(self._plan)):
            while number not in done:
                if iteration != self._iteration:
                    return
                self._receive(done)
            self._ask(epoch, next(numbers, None))
            found = done.pop(number)
            yield found.result() if isinstance(found, Future) else found

    def close(self) -> None:
        _end(self._workers)
        if self._finisher is not None:
            self._finisher.shutdown(wait=False)
            self._finisher = None

    def _start(self) -> None:
        get_temp_dir()  # one for all, removed by this process: of one that is killed it would be left
        for _ in range(self._count):
            here, there = self._context.Pipe()
            held = [] if self._context.get_start_method() != "fork" else [here, *(one.connection for one in self._workers)]
            process = self._context.Process(target=_work, args=(there, held, self._reader, self._plan), daemon=True)
            process.start()
            there.close()  # or its end would not be noticed, in the middle of a message
            self._workers.append(Worker(process, here))
        if self._finish is not None:
            device = torch.cuda.current_device() if torch.cuda.is_available() else -1  # -1: nothing is set
            self._finisher = ThreadPoolExecutor(1, "i2v-finish", lambda: torch.cuda.set_device(device))

    def _ask(self, epoch: int, number: int | None) -> None:
        if number is None:
            return
        worker = self._workers[number % self._count]  # the same for each epoch in order: it has the index in memory
        worker.tasks.append(Task(self._iteration, epoch, number))
        try:
            worker.connection.send(worker.tasks[-1])
        except OSError as error:
            self._fail(worker, error)

    def _receive(self, done: dict[int, Result | Future[Result]]) -> None:
        """Wait for an answer, and take all that are there."""
        sentinels = {worker.process.sentinel: worker for worker in self._workers}
        connections = {worker.connection: worker for worker in self._workers}
        ready = wait([*connections, *sentinels], self._stall)
        if not ready:
            self.close()
            raise Stalled
        for one in ready:
            if one in sentinels:
                self._fail(sentinels[one])
        for worker in [connections[one] for one in ready if one in connections]:
            while worker.connection.poll():
                try:
                    task, found = worker.connection.recv()
                except Exception as error:  # tensors are fetched from the worker while they are read
                    self._fail(worker, error)
                worker.tasks.popleft()
                if task.iteration != self._iteration:
                    continue
                if isinstance(found, Failure):
                    self._iteration += 1  # what the others still make is not asked for again
                    raise found.error from RuntimeError(f"in a worker process:\n{found.text}")
                done[task.number] = self._finisher.submit(self._finish, found) if self._finisher and self._finish else found

    def _fail(self, worker: Worker, error: Exception | None = None) -> None:
        """Raise what ended a worker, or ``error`` if it lives."""
        worker.process.join(_CLOSE_SECONDS)
        code = worker.process.exitcode
        if code is None and error is not None:
            self.close()
            raise error
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
            how = f"was killed by signal {-code} ({name}{', out of memory?' if -code == signal.SIGKILL else ''})"
        doing = "while it had nothing to do"
        if worker.tasks:
            _, epoch, number = worker.tasks[0]
            paths = (self._reader.videos[entry.item].path for entry in self._plan.request(epoch, number).entries)
            doing = f"at or before batch {number} of epoch {epoch}: {', '.join(shown(path) for path in paths)}"
        text = f"ClipLoader: worker process {worker.process.pid} {how} {doing}. A new iteration starts new workers."
        self.close()
        raise RuntimeError(text) from error


def _end(workers: list[Worker]) -> None:
    until = time.monotonic() + _CLOSE_SECONDS
    for worker in workers:
        with suppress(OSError):  # it is dead
            worker.connection.send(None)
    for worker in workers:
        worker.process.join(max(0.0, until - time.monotonic()))
        worker.process.kill()
    for worker in workers:
        worker.connection.close()
        worker.process.join(_CLOSE_SECONDS)
    workers.clear()


def _failure(error: Exception) -> Failure:
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Failure(error, text)


def _work(connection: Connection, held: list[Connection], reader: ClipReader, plan: Plan) -> None:
    """A worker's life. It ends when it is told to, or when there is nobody to tell it."""
    for one in held:
        one.close()  # by a fork it has the other ends too
    # Ctrl-C and a cluster's warning reach all processes: the first decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    tasks: deque[Task] = deque()
    newest = 0
    try:
        while True:
            while not connection.poll(0 if tasks else _PARENT_SECONDS) and not tasks:
                if parent is not None and not parent.is_alive():
                    return
            while connection.poll():
                task = connection.recv()
                if task is None:
                    return
                tasks.append(task)
                newest = task.iteration
            task = tasks.popleft()
            found: Result | Failure | None = None
            if task.iteration == newest:
                try:
                    found = reader[plan.request(task.epoch, task.number)]
                except Exception as error:
                    found = _failure(error)
            connection.send((task, found))
    except (EOFError, OSError):
        return  # nobody is there
