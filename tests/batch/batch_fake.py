"""A model that answers at once, out of order, and always the same; run as a script, a job with it that gets killed."""

import os
import random
import signal
import sys
import time
from collections import deque
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from jaxkv.batch.job import BatchJob
from jaxkv.batch.over_ray import OverRay
from jaxkv.batch.parquet import pyarrow
from jaxkv.batch.workers import Workers
from jaxkv.cache.stats import CacheStats
from jaxkv.requests import Completion, Finished, PromptRead, Refused, SamplingParams, TextMade, Timings

STATS = CacheStats(
    bytes_allocated=4000,
    bytes_held=1000,
    bytes_full=4000,
    bytes_full_16bit=3000,
    kvs_held=8,
    kvs_high=0,
    kvs_low=0,
    kvs_full=32,
    blocks_held=2,
    blocks_full=8,
    blocks_free=0,
    block_size=4,
    blocks_per_head=np.ones((1, 2), np.int32),
    fragmentation=0.0,
    nominal_share=0.25,
)


def completion(prompt: str, params: SamplingParams) -> Completion:
    text = f"{prompt[::-1]} {params.seed} {params.temperature} {params.stop}"[: params.max_tokens]
    return Completion(
        text=text,
        token_ids=[ord(c) for c in text],
        prompt_tokens=len(prompt),
        finish_reason="length",
        logprobs=[-0.5] * len(text) if params.logprobs else None,
        cache=STATS,
        cache_at_end=STATS,
        timings=Timings(),
    )


class FakeLLM:
    """Holds several requests at a time, refuses prompts with ``too long`` in them, and dies of ``deadly`` ones."""

    compression = None
    on_compile = None

    def __init__(self, pause: float = 0.0, held: int = 4):
        self.pause, self.held = pause, held
        self.drawn: list[str] = []

    def chat_prompt(self, messages):
        if messages[0]["role"] == "assistant":
            raise ValueError("the conversation must begin with the user")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def run(self, jobs, *, max_context=None):
        waiting, order, places = deque(), random.Random(0), count()
        for job in jobs:
            if job is None:
                yield from self._answer(*waiting.popleft())
                continue
            self.drawn.append(job[0])
            waiting.append((next(places), *job))
            if len(waiting) == self.held:
                waiting.rotate(order.randrange(self.held))
                yield from self._answer(*waiting.popleft())
        while waiting:
            yield from self._answer(*waiting.pop())

    def _answer(self, index, prompt, params):
        time.sleep(self.pause)
        if "deadly" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if "too long" in prompt:
            yield Refused(request=index, error="prompt is too long")
            return
        made = completion(prompt, params)
        yield PromptRead(request=index, tokens=0, total=len(prompt))
        yield PromptRead(request=index, tokens=len(prompt), total=len(prompt))
        yield TextMade(request=index, text=made.text, token_ids=made.token_ids)
        yield Finished(request=index, completion=made)


def run_job(source: Path, output: Path | str, *, pause: float = 0.0, **settings) -> int:
    with BatchJob(source, output, SamplingParams(), **settings) as job:
        return job.run(FakeLLM(pause))


def run_with_workers(source: Path, output: Path, *, count: int, pause: float) -> int:
    """Prints the process id of each worker as it starts."""
    with BatchJob(source, output, SamplingParams()) as job:
        return job.run(Workers(partial(told_of, pause), count))


def run_over_ray(source: Path, output: Path, *, count: int, pause: float) -> int:
    with BatchJob(source, output, SamplingParams()) as job:
        return job.run(OverRay(partial(FakeLLM, pause), count, together=8))


def told_of(pause: float) -> FakeLLM:
    print("worker", os.getpid(), flush=True)
    return FakeLLM(pause)


def records_of(output: Path) -> Path:
    """The file that a job goes on by."""
    return output if output.suffix == ".jsonl" else output.with_name(f"{output.name}.records.jsonl")


def kill_and_restart(source: Path, output: Path, kills: int, pause: float, seed: int) -> None:
    """Starts the job in a process of its own until it ends by itself; kills the first ones at random moments."""
    moments, written = random.Random(seed), records_of(output)
    if ".parquet" in (source.suffix, output.suffix):
        pyarrow()  # each child would import it
    for attempt in range(kills + 1):
        child = os.fork()  # a fresh interpreter would only import the same again, for seconds
        if not child:
            os._exit(run_job(source, output, pause=pause))
        if attempt < kills:
            time.sleep(moments.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        whole = written.read_bytes().count(b"\n") if written.exists() else 0
        print(status, whole, flush=True)


if __name__ == "__main__":
    what, source, output, pause, seed = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(float, sys.argv[4:6])
    if what == "kills":
        kill_and_restart(source, output, kills=10, pause=pause, seed=int(seed))
    elif what == "workers":
        sys.exit(run_with_workers(source, output, count=2, pause=pause))
    elif what == "ray":
        sys.exit(run_over_ray(source, output, count=2, pause=pause))
    elif what == "small disk":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(seed), int(seed)))
        try:
            run_job(source, output)
        except OSError as error:
            sys.exit(f"{error}")
    else:
        sys.exit(run_job(source, output, pause=pause))
