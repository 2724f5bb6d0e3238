"""Work that may crash, hang or ask for any amount of memory, done in processes that may be lost.

Files from anywhere go through libraries written in C. Here one bad file costs its own result and nothing else: each
piece of work runs in a worker process with a limit of time and of memory, a worker that dies or overruns is replaced,
and the run goes on with the next piece.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from pathlib import Path
from typing import Any

MEMORY = 4 << 30  # bytes of address space that a worker may take beyond what it starts with. Ours
SECONDS = 60.0  # that a task may take. Ours
PARENT_CHECK = 2.0  # seconds between two looks of an idle worker whether the run that it works for is still there


@dataclass(frozen=True)
class Failure:
    """What stands in the place of a result."""

    reason: str  # "time", "memory", "crash" or "error"
    detail: str  # in words: which limit, which signal, which exception


# What a user is told of a file.
FAILURES = {
    "time": "takes too long",
    "memory": "takes too much memory",
    "crash": "crashes the reader",
    "error": "cannot be read",
}


def why(failure: Failure) -> tuple[str, str]:
    """A file's failure as a reason that many share and a detail; of one `"refused"`, the detail is the reason."""
    if failure.reason == "refused":
        return failure.detail, ""
    return FAILURES[failure.reason], failure.detail


def run_guarded(
    work: Callable[[Any], Any],
    tasks: Iterable[Any],
    *,
    workers: int = 1,
    seconds: Callable[[Any], float] = lambda task: SECONDS,
    memory: int = MEMORY,
    ahead: int = 4,
    skip: Callable[[Any], bool] = lambda task: False,
) -> Iterator[tuple[Any, Any]]:
    """Do ``work`` on each of ``tasks`` in worker processes; their order is kept, whatever the number of workers.

    A worker that was killed (by its task, or by somebody else) is replaced and its task done once more; a task that
    loses two workers, overruns its time or raises gets a `Failure` for a result. So does one that runs out of memory.
    Workers are forked, so ``work`` may be any callable; tasks and results are pickled. They end when the iterator is
    closed, and by themselves when the process that started them is gone.

    Args:
        work: the function; an exception that it raises is its task's `Failure`.
        tasks: consumed no faster than results are.
        workers: processes, also when there is only one.
        seconds: how long a task may take.
        memory: bytes of address space that a worker may add (Linux; elsewhere there is no such limit).
        ahead: tasks a worker that may be done before an earlier one is; it bounds the results that wait in memory.
        skip: asked just before a task starts: true to have None for a result instead.

    Yields:
        Pairs of a task and its result, in the order of ``tasks``.
    """
    waiting = iter(tasks)
    crew = [_Worker(work, memory) for _ in range(max(workers, 1))]
    known: dict[int, Any] = {}  # tasks begun and not yielded, by number
    results: dict[int, Any] = {}
    begun = given = 0
    exhausted = False
    try:
        while True:
            for worker in crew:
                while worker.number is None and not exhausted and begun - given < ahead * len(crew):
                    try:
                        task = next(waiting)
                    except StopIteration:
                        exhausted = True
                        break
                    known[begun] = task
                    if skip(task):
                        results[begun] = None
                    else:
                        worker.start(begun, task, seconds(task))
                    begun += 1
            while given in results:
                yield known.pop(given), results.pop(given)
                given += 1
            busy = [worker for worker in crew if worker.number is not None]
            if not busy:
                if exhausted and given == begun:
                    return
                continue
            patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            ready = connection.wait([worker.connection for worker in busy], timeout=min(patience, 1.0))
            for worker in busy:
                number = worker.number
                if worker.connection in ready or worker.connection.poll():
                    result = worker.finish()
                elif time.monotonic() > worker.deadline:
                    result = worker.give_up()
                elif not worker.process.is_alive() and not worker.connection.poll():
                    result = worker.lost()
                else:
                    continue
                if result is not _AGAIN:
                    results[number] = result
    finally:
        for worker in crew:
            worker.end()


def map_in_order(
    work: Callable[[Any], Any], tasks: Iterable[Any], *, workers: int = 1, batch: int = 16
) -> Iterator[Any]:
    """``map(work, tasks)`` over processes, for work of our own that should not fail; none is started for one worker.

    A worker that is killed costs nothing but the time to do its tasks again, unlike in `multiprocessing.Pool`, which
    waits for them forever.

    Args:
        work: the function.
        tasks: consumed no faster than results are.
        workers: processes; results come in the order of ``tasks`` for any number.
        batch: tasks that go to a worker at once.

    Raises:
        RuntimeError: tasks raised in a worker, lost two, or took over a minute each.
    """
    if workers <= 1:
        yield from map(work, tasks)
        return
    left = iter(tasks)
    batches = iter(lambda: list(islice(left, batch)), [])
    done = run_guarded(
        lambda several: [work(task) for task in several],
        batches,
        workers=workers,
        seconds=lambda several: SECONDS * len(several),
    )
    for several, results in done:
        if isinstance(results, Failure):
            raise RuntimeError(f"a worker failed at {several[0]!r} ... {several[-1]!r}: {results.detail}")
        yield from results


_AGAIN = object()  # the task has been given to a new process


class _Worker:
    """One process after another that does one task after another."""

    def __init__(self, work, memory: int):
        self.work = work
        self.memory = memory
        self.number: int | None = None  # of the task in work
        self.deadline = 0.0
        self._spawn()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.work, self.memory, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, number: int, task: Any, seconds: float) -> None:
        self.number, self.task, self.seconds, self.deaths = number, task, seconds, 0
        self._send()

    def _send(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        try:
            self.connection.send(self.task)
        except (BrokenPipeError, ConnectionResetError):  # killed while it was idle
            self._replace()
            self.connection.send(self.task)

    def finish(self) -> Any:
        try:
            result = self.connection.recv()
        except (EOFError, OSError):
            return self.lost()
        self.number = None
        return result

    def lost(self) -> Any:
        self.process.join()
        code = self.process.exitcode or 0
        self._replace()
        self.deaths += 1
        if self.deaths == 1:
            self._send()
            return _AGAIN
        self.number = None
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Failure("crash", f"ended its process twice ({name})")

    def give_up(self) -> Failure:
        self._replace()
        self.number = None
        return Failure("time", f"took longer than {self.seconds:g} s")

    def _replace(self) -> None:
        self.end()
        self._spawn()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(channel: connection.Connection, work, memory: int, parent: int) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    faulthandler.disable()  # a crash is reported as a refusal, not as a dump on the terminal
    _limit_memory(memory)
    while True:
        while not channel.poll(PARENT_CHECK):
            if os.getppid() != parent:
                os._exit(0)
        try:
            result = work(channel.recv())
        except EOFError:
            os._exit(0)
        except MemoryError:
            result = Failure("memory", f"needs more than {memory / 2**30:g} GiB")
        except Exception as error:  # whatever a damaged file makes a library raise is that file's failure alone
            result = Failure("error", f"{type(error).__name__}: {error}"[:300])
        try:
            channel.send(result)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


def _limit_memory(memory: int) -> None:
    statm = Path("/proc/self/statm")
    if sys.platform == "linux" and statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, hard))
