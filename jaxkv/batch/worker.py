"""A process of its own that answers what another one gives it, as its engine has room for it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from jaxkv.batch.job import Model
from jaxkv.requests import Event, Finished, Refused, SamplingParams

TELL_SECONDS = 0.1
"""Between two messages about answers in the making."""
ORPHANED = 71
"""Exit status of one whose parent is gone."""


@dataclass(frozen=True)
class Task:
    """To a worker: answer this."""

    index: int
    prompt: str | Sequence[int]
    params: SamplingParams


@dataclass(frozen=True)
class NothingNow:
    """To a worker that asked: there may be more later, unasked."""


@dataclass(frozen=True)
class TheEnd:
    """To a worker: there will be nothing more."""


@dataclass(frozen=True)
class Ready:
    """Of a worker: its model is loaded, and it takes a task."""


@dataclass(frozen=True)
class Wants:
    """Of a worker: it takes a task."""


@dataclass(frozen=True)
class Compiling:
    """Of a worker: it is going to compile this program."""

    program: str


@dataclass(frozen=True)
class Failed:
    """Of a worker: nothing can be answered with these settings."""

    error: str


@dataclass(frozen=True)
class Told:
    """Of a worker: what happened, with requests by their tasks' indices."""

    events: list[Event]
    compile_seconds: float
    """So far."""


Message = Ready | Wants | Compiling | Failed | Told


def work(
    connection: Connection, make: Callable[[], Model], max_context: int | None, cores: set[int] | None = None
) -> None:
    """What a worker does from its first moment to its last, on these of the machine's cores; None: on all."""
    if cores is not None:
        os.sched_setaffinity(0, cores)  # before JAX counts them
    try:
        model = make()
        model.on_compile = lambda program: connection.send(Compiling(program))
        connection.send(Ready())
        _Work(connection, model).run(max_context)
    except (ValueError, OSError) as error:
        with contextlib.suppress(OSError):  # the parent may be the one who is gone
            connection.send(Failed(str(error)))


class _Work:
    def __init__(self, connection: Connection, model: Model):
        self.connection, self.model = connection, model
        self.inbox: queue.SimpleQueue[Task | NothingNow | TheEnd] = queue.SimpleQueue()
        self.indices: list[int] = []
        """Of the tasks, in the order in which the model took them."""
        self.in_flight = 0
        self.events: list[Event] = []
        self.told = time.monotonic()

    def run(self, max_context: int | None) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        for event in self.model.run(self._tasks(), max_context=max_context):
            ended = isinstance(event, Finished | Refused)
            self.in_flight -= ended
            self.events.append(replace(event, request=self.indices[event.request]))
            if ended or time.monotonic() - self.told >= TELL_SECONDS:
                self._tell()

    def _tasks(self) -> Iterator[tuple[str | Sequence[int], SamplingParams] | None]:
        """None for now, where others are being answered and none has come; where nobody is, waits for one."""
        may_come = True
        while True:
            wait = may_come or not self.in_flight
            if wait and self.events:
                self._tell()
            try:
                got = self.inbox.get(block=wait)
            except queue.Empty:
                yield None
                continue
            match got:
                case TheEnd():
                    return
                case NothingNow():
                    may_come = False
                case Task(index=index, prompt=prompt, params=params):
                    self.connection.send(Wants())  # the next one comes while this one is taken
                    may_come = True
                    self.indices.append(index)
                    self.in_flight += 1
                    yield prompt, params

    def _tell(self) -> None:
        self.connection.send(Told(self.events, getattr(self.model, "compile_seconds", 0.0)))
        self.events, self.told = [], time.monotonic()

    def _listen(self) -> None:
        """Takes in what is sent at once, so that the parent never waits; ends with it, whatever goes on here."""
        while True:
            try:
                self.inbox.put(self.connection.recv())
            except (EOFError, OSError):
                os._exit(ORPHANED)
