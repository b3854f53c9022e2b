"""Many engines on one host, each in a process of its own, behind what a batch job needs of one model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import Any

from tqdm import tqdm

from jaxkv.arguments import chat_prompt
from jaxkv.batch.job import Jobs, Model
from jaxkv.batch.worker import Compiling, Failed, NothingNow, Ready, Task, TheEnd, Told, Wants, work
from jaxkv.requests import Event, Finished, Refused
from models import Tokenizer

PROCESSES = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
DEATHS = 2
"""Of workers that had the same request: then it is tried alone."""
MOST_DEATHS = 8
"""Of workers one after the other, none of which answered anything: then it isn't the requests."""
END_SECONDS = 5.0
"""That a worker has to end by itself once there is nothing more to do."""


class Workers:
    """Answers as one ``LLM`` would, each request by whoever has room for it.

    A worker that dies is started again, and what it had is done once more, by whoever has room. A request that two
    workers died with is then given to one that has nothing else; if that dies too, it is refused.

    Args:
      make: makes a worker's model, in its process; a picklable function.
      count: how many workers.
      environment: variables of the worker of this number, beside this process's own.
      tokenizer: for conversations; a worker's model has its own.
    """

    def __init__(
        self,
        make: Callable[[], Model],
        count: int,
        *,
        environment: Callable[[int], Mapping[str, str]] = lambda number: {},
        tokenizer: Tokenizer | None = None,
    ):
        self.make, self.count, self.environment, self.tokenizer = make, count, environment, tokenizer
        self.on_compile: Callable[[str], None] | None = None
        self.restarts = 0
        self.compile_seconds = 0.0
        """Of the worker that has compiled longest."""

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """As ``LLM.chat_prompt``."""
        return chat_prompt(self.tokenizer, messages)

    def run(self, jobs: Jobs, *, max_context: int | None = None) -> Iterator[Event]:
        """As ``LLM.run``.

        Raises:
          ValueError: the workers can't be made as is asked, or could answer nothing.
          RuntimeError: they die whatever they are given.
        """
        pool = _Pool(self, jobs, max_context)
        try:
            yield from pool.run()
            pool.end()
        finally:
            pool.kill()


class _Worker:
    """A process, and what it has been given."""

    def __init__(
        self,
        make: Callable[[], Model],
        max_context: int | None,
        environment: Mapping[str, str],
        cores: set[int] | None,
    ):
        self.connection, its_end = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=work, args=(its_end, make, max_context, cores), daemon=True)
        with _inherited(environment):
            self.process.start()
        its_end.close()
        self.tasks: dict[int, Task] = {}
        self.wants = self.was_told = self.alone = False
        """Whether it takes a task; was told that there is none now; has one that must stay alone."""

    def give(self, task: Task) -> None:
        self.tasks[task.index] = task
        self.wants = self.was_told = False
        self.send(task)

    def send(self, message: Any) -> None:
        with suppress(OSError):  # it is dead, which its end of the pipe tells next
            self.connection.send(message)


class _Pool:
    """The workers of one run, and whose turn each request is."""

    def __init__(self, of: Workers, jobs: Jobs, max_context: int | None):
        self.of, self.max_context = of, max_context
        self.source: Iterator[Task] | None = (
            Task(index, *job) for index, job in enumerate(job for job in jobs if job is not None)
        )
        """None: it has no more."""
        self.back: deque[Task] = deque()
        """Those whose workers died, and which go first."""
        self.suspects: deque[Task] = deque()
        """Those that are to be tried alone."""
        self.deaths: Counter[int] = Counter()
        self.deaths_in_a_row = 0
        self.workers = [self._start(number) for number in range(of.count)]

    def run(self) -> Iterator[Event]:
        while True:
            for worker in sorted(self.workers, key=lambda worker: len(worker.tasks)):
                self._feed(worker)
            if self._is_done():
                return
            for connection in wait([worker.connection for worker in self.workers]):
                number = next(n for n, worker in enumerate(self.workers) if worker.connection is connection)
                yield from self._hear(number)

    def end(self) -> None:
        """Lets all of them end by themselves."""
        for worker in self.workers:
            worker.send(TheEnd())
        for worker in self.workers:
            worker.process.join(END_SECONDS)

    def kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()

    def _start(self, number: int) -> _Worker:
        cores = own_cores(number, self.of.count)
        return _Worker(self.of.make, self.max_context, self.of.environment(number), cores)

    def _is_done(self) -> bool:
        waiting = self.source is not None or self.back or self.suspects
        return not waiting and not any(worker.tasks for worker in self.workers)

    def _feed(self, worker: _Worker) -> None:
        if not worker.wants:
            return
        task = self._next_for(worker)
        if task is not None:
            worker.give(task)
        elif not worker.was_told:
            worker.was_told = True
            worker.send(NothingNow())

    def _next_for(self, worker: _Worker) -> Task | None:
        if worker.alone:
            return None
        if self.suspects and not worker.tasks:
            worker.alone = True
            return self.suspects.popleft()
        if self.back:
            return self.back.popleft()
        task = None if self.source is None else next(self.source, None)
        if task is None:
            self.source = None
        return task

    def _hear(self, number: int) -> Iterator[Event]:
        worker = self.workers[number]
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            yield from self._died(number)
            return
        match message:
            case Ready() | Wants():
                worker.wants = True
            case Compiling(program=program):
                if self.of.on_compile is not None:
                    self.of.on_compile(program)
            case Failed(error=error):
                raise ValueError(error)
            case Told(events=events, compile_seconds=seconds):
                self.of.compile_seconds = max(self.of.compile_seconds, seconds)
                for event in events:
                    if isinstance(event, Finished | Refused):
                        del worker.tasks[event.request]
                        worker.alone, self.deaths_in_a_row = False, 0
                    yield event

    def _died(self, number: int) -> Iterator[Event]:
        """Its requests go to others, or are refused; another takes its place."""
        worker = self.workers[number]
        worker.process.join()
        worker.connection.close()
        how = _ended(worker.process.exitcode)
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row > MOST_DEATHS:
            raise RuntimeError(
                f"{self.deaths_in_a_row} workers died one after the other, the last {how}, and none answered anything; "
                "what they wrote to standard error says more. A worker that is killed (signal 9) may have had too "
                "little memory: give less --cache-memory, or fewer --workers"
            )
        self.of.restarts += 1
        tqdm.write(
            f"jaxkv: worker {number} died ({how}) with {len(worker.tasks)} requests; they are done again",
            file=sys.stderr,
        )
        self.workers[number] = self._start(number)
        for task in worker.tasks.values():
            self.deaths[task.index] += 1
            if self.deaths[task.index] < DEATHS:
                self.back.append(task)
            elif len(worker.tasks) > 1:
                self.suspects.append(task)
            else:
                died = f"{self.deaths[task.index]} workers died with it, the last one {how}, which had nothing else"
                yield Refused(request=task.index, error=died)


def own_cores(number: int, workers: int) -> set[int] | None:
    """Of the cores that this process may use, those of the worker of this number: threads of each for all cores would
    wait for those of the others. None where there are fewer cores than workers, or the system doesn't say."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[number * len(cores) // workers : (number + 1) * len(cores) // workers]) or None


def own_devices(number: int, devices: int) -> dict[str, str]:
    """Variables that show the worker of this number its own devices of this host, so many, and no others."""
    own = range(number * devices, (number + 1) * devices)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = [visible[i] for i in own if i < len(visible)] if visible != [""] else map(str, own)
    port = str(8476 + number)
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "TPU_VISIBLE_CHIPS": ",".join(map(str, own)),
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}.get(devices, f"2,{devices // 2},1"),
        "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
        "TPU_PROCESS_PORT": port,
        "CLOUD_TPU_TASK_ID": "0",
    }


def _ended(exitcode: int | None) -> str:
    return f"by signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"with exit status {exitcode}"


@contextmanager
def _inherited(environment: Mapping[str, str]) -> Iterator[None]:
    """What is started here has these variables from its first moment, and leaves Ctrl-C to this process."""
    before = {name: os.environ.get(name) for name in environment}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
