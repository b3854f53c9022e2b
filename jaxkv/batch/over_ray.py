"""Engines on the machines of a Ray cluster, behind what a batch job needs of one model (``pip install jaxkv[ray]``)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxkv.arguments import chat_prompt
from jaxkv.batch.job import Jobs, Model
from jaxkv.batch.worker import Task
from jaxkv.requests import Event, Finished, Refused
from models import Tokenizer

TRIES = 2
"""That requests which a worker died with have together, and then each alone."""


class OverRay:
    """Answers as one ``LLM`` would: the requests go over Ray Data, some at a time and in their order, so that those
    which begin alike stay together, to actors that have a model each.

    What a dead actor had is done again. All requests are drawn before the first is answered.

    Args:
      make: makes an actor's model; a picklable function.
      count: actors; None: as many as the cluster's devices allow, and one where it has CPUs only.
      address: of the cluster, as Ray takes it: ``"auto"``, ``"ray://…"``; ``"local"``: one that is started here.
      devices: of each actor.
      together: requests that an actor is given at a time; it begins the next only when these are answered.
      tokenizer: for conversations; an actor's model has its own.

    Raises:
      ValueError: Ray isn't installed, or its cluster can't be reached.
    """

    def __init__(
        self,
        make: Callable[[], Model],
        count: int | None = None,
        *,
        address: str = "local",
        devices: int = 1,
        together: int = 64,
        tokenizer: Tokenizer | None = None,
    ):
        self.make, self.together, self.tokenizer = make, together, tokenizer
        self.on_compile: Callable[[str], None] | None = None
        self.ray = connected(address)
        self.resources = needs(self.ray.cluster_resources(), devices)
        self.count = places(self.ray.cluster_resources(), self.resources) if count is None else count

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """As ``LLM.chat_prompt``."""
        return chat_prompt(self.tokenizer, messages)

    def run(self, jobs: Jobs, *, max_context: int | None = None) -> Iterator[Event]:
        """As ``LLM.run``; of the events there are only the ends.

        Raises:
          ValueError: an actor's model can't be made as is asked.
        """
        each = (job for job in jobs if job is not None)
        left = {index: pickle.dumps(Task(index, *job)) for index, job in enumerate(each)}
        for together in (self.together, 1):
            for event in self._answers(left, together, max_context):
                del left[event.request]
                yield event
        for index in left:
            yield Refused(request=index, error=f"{TRIES} workers died with it and others, and {TRIES} with it alone")

    def _answers(self, tasks: dict[int, bytes], together: int, max_context: int | None) -> Iterator[Finished | Refused]:
        """Of these tasks, but for those in blocks whose actors died."""
        if not tasks:
            return
        blocks = -(-len(tasks) // together)
        rows = self.ray.data.from_items([{"task": task} for task in tasks.values()], override_num_blocks=blocks)
        answers = rows.map_batches(
            Answers,
            fn_constructor_args=(self.make, max_context),
            batch_size=None,
            compute=self.ray.data.ActorPoolStrategy(size=min(self.count, blocks)),
            max_restarts=-1,
            max_task_retries=TRIES - 1,
            **self.resources,
        )
        for row in answers.iter_rows():
            end = pickle.loads(row["end"])
            if isinstance(end, str):
                raise ValueError(end)
            yield end


class Answers:
    """An actor: a model, and the ends of what it is given."""

    def __init__(self, make: Callable[[], Model], max_context: int | None):
        self.max_context, self.fault = max_context, ""
        try:
            self.model = make()
        except (ValueError, OSError) as error:  # raised here, Ray would make another, for ever
            self.fault = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        tasks: list[Task] = [pickle.loads(task) for task in batch["task"]]
        return {"end": [pickle.dumps(end) for end in self._ends(tasks)]}

    def _ends(self, tasks: list[Task]) -> Iterator[Finished | Refused | str]:
        if self.fault:
            yield self.fault
            return
        try:
            for event in self.model.run([(t.prompt, t.params) for t in tasks], max_context=self.max_context):
                if isinstance(event, Finished):
                    yield Finished(request=tasks[event.request].index, completion=event.completion)
                elif isinstance(event, Refused):
                    yield Refused(request=tasks[event.request].index, error=event.error)
        except (ValueError, OSError) as error:
            yield str(error)


def connected(address: str) -> Any:
    """The ``ray`` module, with a cluster.

    Raises:
      ValueError: there is none.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"--ray needs Ray Data: pip install 'jaxkv[ray]' ({error})") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=False)
        except ConnectionError as error:
            raise ValueError(f"no Ray cluster answers at {address}: {error}") from None
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1  # what these had is found missing, and tried alone
    context.enable_progress_bars = False
    return ray


def needs(there: dict[str, float], devices: int) -> dict[str, Any]:
    """What an actor with so many devices asks of a cluster that has all this."""
    if there.get("TPU"):
        return {"num_cpus": 1, "resources": {"TPU": devices}}
    return {"num_cpus": 1, "num_gpus": devices} if there.get("GPU") else {"num_cpus": 1}


def places(there: dict[str, float], each: dict[str, Any]) -> int:
    """Actors that the cluster's devices are enough for; one where it has none."""
    if "resources" in each:
        return max(int(there["TPU"] // each["resources"]["TPU"]), 1)
    return max(int(there["GPU"] // each["num_gpus"]), 1) if "num_gpus" in each else 1
