"""What the commands do; all that is heavy is imported here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from tqdm import tqdm

from jaxkv.arguments import Prompt
from jaxkv.cli.options import answer_settings
from jaxkv.cli.plot import check_drawable, head_map
from jaxkv.cli.terminal import can_say
from jaxkv.engine.schedule import Latency, Schedule, Throughput
from jaxkv.llm import LLM
from jaxkv.policies import Auto, Policy, policy_from
from jaxkv.report import as_dict, summary
from jaxkv.requests import Completion, Event, Finished, PromptRead, SamplingParams, TextMade
from jaxkv.words import DTYPES, SAMPLING, SCHEDULES
from models import load_model, load_tokenizer, resolve
from models.convert import convert, stored_dtype
from models.families import Model

if TYPE_CHECKING:
    from jaxkv.batch.over_ray import OverRay
    from jaxkv.batch.workers import Workers

ROUNDS = 4
"""Times the requests that are answered together: what a Ray actor gets at once, whose batch runs empty after that."""
SCHEDULE: dict[str, Schedule] = dict(zip(SCHEDULES, (Throughput(), Latency()), strict=True))
Heed = Callable[[Iterable[Event]], Iterable[Event]]
"""Passes events on, and raises KeyboardInterrupt in between where Ctrl-C was heard."""


def run_generate(options: argparse.Namespace, heed: Heed = iter) -> int:
    if sys.stdout is None:
        raise ValueError("standard output is closed, so the answer would be lost; send it somewhere: > answer.txt")
    text, policy, params = read_prompt(options), policy_from(vars(options)), sampling_from(options)
    if (options.logprobs or options.top_logprobs) and not options.json:
        raise ValueError("--logprobs and --top-logprobs are printed by --json alone; add it")
    if options.system is not None and not options.chat:
        raise ValueError("--system needs --chat")
    if options.plot is not None:
        check_drawable(options.plot)
    llm = load(options, policy)
    prompt: Prompt = text
    if options.chat:
        system = [{"role": "system", "content": options.system}] if options.system is not None else []
        prompt = llm.chat_prompt([*system, {"role": "user", "content": text}])

    completion = answer(llm, prompt, params, quiet=options.json, heed=heed)
    if options.json:
        print(json.dumps(as_dict(completion)), flush=True)
    else:
        print(f"\n\n{summary(completion)}", file=sys.stderr)
        if not can_say(completion.text):
            print(
                f"jaxkv: standard output is {sys.stdout.encoding}, which lacks letters of the answer: they became '?'; "
                "set PYTHONIOENCODING=utf-8, or give --json",
                file=sys.stderr,
            )
    if options.plot is not None:  # last: the answer is out, whatever a full disk does to the picture
        head_map(completion.cache, options.plot)
    return 0


def run_batch(options: argparse.Namespace, heed: Heed = iter) -> int:
    from jaxkv.batch.job import BatchJob  # locks files, which generate can do without where a system can't

    policy, params = policy_from(vars(options)), sampling_from(options)
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}")
    with BatchJob(
        options.input,
        options.output,
        params,
        answer_settings(options),
        retry_failed=options.retry_failed,
        output_format=options.output_format,
    ) as job:
        if not job.left:
            return job.finish()
        settings = {name: getattr(options, name) for name in ("max_batch", "share_prefixes", "split_prompts")}
        alone = options.ray is None and options.workers in (None, 1)
        llm = load(options, policy, **settings) if alone else workers(options, policy, settings)
        return job.run(llm, max_context=options.max_context, heed=heed)


def run_convert(options: argparse.Namespace, heed: Heed = iter) -> int:
    check_platform()
    source = resolve(options.model)
    model = convert(source, options.output, lambda path: load_to_convert(path, options.weights))
    arrays = jax.tree.leaves(model)
    size = sum(array.nbytes for array in arrays)
    kinds = ", ".join(sorted({str(array.dtype) for array in arrays}))
    print(f"jaxkv: {options.output} holds {size / 1e9:.2f} GB of weights ({kinds})", file=sys.stderr)
    return 0


def load_to_convert(path: Path, weights: str) -> Model:
    """The model with its weights as they are to be written."""
    if weights in DTYPES:
        return load_model(path, dtype=weights)
    return load_model(path, dtype=stored_dtype(path), weights=weights)


COMMANDS = {"generate": run_generate, "batch": run_batch, "convert": run_convert}


def load(options: argparse.Namespace, policy: Policy | None, **settings: Any) -> LLM:
    """The model that is asked for.

    Raises:
      ValueError: it can't be read, or JAX can't run here.
    """
    check_platform()
    llm = LLM(
        options.model,
        compression=policy,
        cache_memory=options.cache_memory,
        block_size=options.block_size,
        dtype=options.dtype,
        weights=options.weights,
        cache_dtype=options.cache_dtype,
        generation_config=options.generation_config,
        schedule=None if options.schedule is None else SCHEDULE[options.schedule],
        devices=options.devices,
        **settings,
    )
    if isinstance(llm.compression, Auto):
        print(f"jaxkv: auto scores by {llm.compression.method}", file=sys.stderr)
    return llm


def workers(options: argparse.Namespace, policy: Policy | None, settings: Mapping[str, Any]) -> Workers | OverRay:
    """Several of the models that are asked for, each in a process of its own; here there is only their tokenizer."""
    from jaxkv.batch.over_ray import OverRay
    from jaxkv.batch.workers import Workers, own_devices

    tokenizer = load_tokenizer(resolve(options.model))
    make = partial(load_one_of, options.workers or 1, options, policy, **settings)
    if options.ray is None:
        environment = partial(own_devices, devices=options.devices)
        return Workers(make, options.workers, environment=environment, tokenizer=tokenizer)
    return OverRay(
        make,
        options.workers,
        address=options.ray,
        devices=options.devices,
        together=ROUNDS * options.max_batch,
        tokenizer=tokenizer,
    )


def load_one_of(engines: int, options: argparse.Namespace, policy: Policy | None, **settings: Any) -> LLM:
    """One of so many on this machine."""
    llm = load(options, policy, **settings)
    llm.devices = replace(llm.devices, engines=engines)
    return llm


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt's text.

    Raises:
      ValueError: the file can't be read, isn't UTF-8, or holds nothing.
    """
    if options.prompt is not None:
        return options.prompt
    path: Path = options.prompt_file
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise ValueError(f"can't read the prompt from {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path} holds no text; the prompt must not be empty")
    return text


def sampling_from(options: argparse.Namespace) -> SamplingParams:
    return SamplingParams(**{name: getattr(options, name) for name in SAMPLING})


def answer(llm: LLM, prompt: Prompt, params: SamplingParams, *, quiet: bool, heed: Heed = iter) -> Completion:
    """Generates with a progress bar for the prompt and, unless ``quiet``, the text as it comes."""
    bar: tqdm | None = None
    try:
        for event in heed(llm.events([prompt], params)):
            match event:
                case PromptRead(tokens=tokens, total=total):
                    bar = bar or tqdm(total=total, desc="reading the prompt", unit="tok", file=sys.stderr, leave=False)
                    bar.update(tokens - bar.n)
                case TextMade(text=text):
                    if bar is not None:
                        bar.close()
                    if not quiet:
                        print(text, end="", flush=True)
                case Finished(completion=completion):
                    return completion
    finally:
        if bar is not None:
            bar.close()
    raise AssertionError("a request ends with its Finished event")


def check_platform() -> None:
    """Raises ValueError where JAX has nothing to run on."""
    try:
        jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(f"JAX can't run with JAX_PLATFORMS={asked!r}: {error}; unset it") from None
