"""A context that is read once, compressed, and asked about as often as one likes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkv.arguments import Messages, Prompt, conversations, is_one, params_with
from jaxkv.cache import CacheConfig, PagedCache, init_cache
from jaxkv.cache.config import TierConfig
from jaxkv.cache.files import load_snapshot, save_snapshot
from jaxkv.cache.snapshot import Snapshot
from jaxkv.engine import sizing
from jaxkv.requests import Completion, Event, Finished, Refused, SamplingParams
from jaxkv.serving import Serving
from models import Decoder
from models.checkpoints.assemble import parameters_of

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Where the question goes in a conversation."""
SAMPLE = 8
"""Values of a matrix that are kept beside a saved context."""
STEP = 64
"""Tokens to which questions with their answers are rounded up, so that calls share compiled programs."""


class Context:
    """Made by ``LLM.read`` or ``LLM.load_context``, to be asked.

    It holds the KVs that are left of what was read, as they are held in a cache: ``nbytes``. A question gets a cache
    for the time of the call, in which all begin with the same blocks. What follows the context, question and answer,
    isn't compressed.
    """

    def __init__(self, serving: Serving, snapshot: Snapshot, suffix: str = ""):
        self._serving, self._snapshot, self._suffix = serving, snapshot, suffix
        self.tokens = int(snapshot.num_tokens)
        """Of the context, before it was compressed."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self._held().nbytes

    def __repr__(self) -> str:
        held = "given back" if self._snapshot is None else f"{self.nbytes / 1e6:.1f} MB"
        return f"<Context of {self.tokens} tokens, {held}>"

    def ask(
        self,
        questions: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Answers questions, each as if it alone followed the context.

        Args:
          questions: a text, token ids, or several of either.
          params: one for all questions, or one each; their ``compression`` means nothing here.
          sampling: fields of ``SamplingParams``, over those of ``params``.

        Returns:
          The answers in the questions' order.

        Raises:
          ValueError: a question that is empty or too long, or too little memory; a context that was given back.
        """
        batch: Sequence[Prompt] = [questions] if is_one(questions) else questions  # pyright: ignore[reportAssignmentType]
        events = self.events(batch, params_with(params, sampling, "ask"))
        done = {e.request: e.completion for e in events if isinstance(e, Finished)}
        return [done[i] for i in range(len(batch))]

    def events(
        self, questions: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Event]:
        """As ``LLM.events``, of questions."""
        held, serving = self._held(), self._serving
        if self._suffix:
            questions = [each + self._suffix if isinstance(each, str) else each for each in questions]
        requests = serving._requests(questions, params, self.tokens)
        if not requests:
            return
        config = self._config(
            held,
            rows=min(serving.max_batch, sizing.power_of_two(sum(r.params.n for r in requests))),
            longest=max(len(r.prompt) + r.limit for r in requests),
        )
        yield from serving._answers(requests, config, self._cache(held, config))

    def save(self, path: str | Path) -> None:
        """Writes it to one file, of about as many bytes as it holds.

        Raises:
          OSError: it can't be written.
        """
        said = {"suffix": self._suffix, "weights": _some_weights(self._serving.model)}
        save_snapshot(self._held(), Path(path), said)

    def close(self) -> None:
        """Gives its memory back; it can't be asked any more."""
        self._snapshot = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _held(self) -> Snapshot:
        if self._snapshot is None:
            raise ValueError("this context was given back (close); read it again, or load it where it was saved")
        return self._snapshot

    def _config(self, held: Snapshot, *, rows: int, longest: int) -> CacheConfig:
        """A cache with a row for the context and others for questions with their answers, which share its blocks.

        Raises:
          ValueError: there is too little memory for it.
        """
        serving, each = self._serving, -(-longest // STEP) * STEP
        raw, quantised = held.blocks
        config = CacheConfig.for_model(
            serving.model.sizes,
            batch=rows + 1,
            max_context=sizing.rounded_up(self.tokens + each),
            num_blocks=2,
            block_size=serving.block_size,
            dtype=serving.cache_dtype,  # pyright: ignore[reportArgumentType]
        )
        if held.layout is not None:
            config = replace(config, tiers=TierConfig(layout=held.layout, num_blocks=max(quantised, 1) + 1))
        one = config.full_blocks(each) + config.heads  # of its own last block a head, too
        config = replace(config, num_blocks=1 + raw + rows * one)
        memory = serving.cache_memory
        if memory is not None and config.nbytes > memory:
            fewer = (config.nbytes - memory) // config.block_bytes + 1
            config = replace(config, num_blocks=max(config.num_blocks - fewer, 2))
            if config.num_blocks < 1 + raw + one:
                need = config.bytes_with(1 + raw + one)
                raise ValueError(f"cache_memory of {memory} bytes holds no question; give at least {need} bytes")
        sizing.check_memory(config, self._serving.devices.memory()[0])
        return config

    def _cache(self, held: Snapshot, config: CacheConfig) -> PagedCache:
        cache, granted = self._serving._programs_now().put(init_cache(config), config.batch - 1, held)
        assert granted
        return cache


def read(serving: Serving, context: Prompt | Messages, params: SamplingParams) -> Context:
    """Reads and compresses a context, with memory that is given back but for what it leaves."""
    _check_devices(serving)
    prompt, suffix = _opened(serving, context)
    request = replace(serving._request(0, prompt, params), keeps=True)
    config = serving._new_config(request.policy, len(request.prompt) + 1, rows=1)
    if request.policy is not None:
        request.policy.check(config)
    sequence = serving._sequence(request, config)
    for event in serving._read(sequence, config):
        if isinstance(event, Refused):
            raise ValueError(event.error)
    assert sequence.kept is not None
    return Context(serving, sequence.kept, suffix)


def _opened(serving: Serving, context: Prompt | Messages) -> tuple[Prompt, str]:
    """The beginning of what each question asks, as a prompt, and what follows each question."""
    if isinstance(context, str) or len(context) == 0 or not isinstance(context[0], Mapping):
        return context, ""  # pyright: ignore[reportReturnType]
    [messages] = conversations(context)  # pyright: ignore[reportArgumentType]
    if serving.tokenizer is None:
        raise ValueError("this LLM has no tokenizer, so it has no chat format; give the context as token ids")
    *before, last = messages
    if last.get("role") != "user":
        raise ValueError(f"the last message must be the user's, with which questions go on, got {last.get('role')!r}")
    text = serving.tokenizer.chat([*before, {**last, "content": f"{last.get('content')}{MARK}"}])
    start, _, suffix = text.partition(MARK)
    return serving.tokenizer.encode_chat(start), suffix


def load(serving: Serving, path: Path) -> Context:
    """What ``Context.save`` wrote."""
    _check_devices(serving)
    snapshot, said = load_snapshot(path)
    sizes, shape = serving.model.sizes, snapshot.lengths.shape[:2]
    config = CacheConfig.for_model(
        sizes,
        batch=1,
        max_context=STEP,
        num_blocks=2,
        block_size=serving.block_size,
        dtype=serving.cache_dtype,  # pyright: ignore[reportArgumentType]
    )
    ours = config.shapes.raw.pool
    if shape != (sizes.num_layers, sizes.num_kv_heads) or (snapshot.pool.shape[1:], snapshot.pool.dtype) != (
        ours.shape[1:],
        ours.dtype,
    ):
        raise ValueError(
            f"{path} has KVs of {shape[0]} layers and {shape[1]} heads in blocks {snapshot.pool.shape[1:]} of "
            f"{snapshot.pool.dtype}, and this model needs {sizes.num_layers} and {sizes.num_kv_heads} in blocks "
            f"{ours.shape[1:]} of {ours.dtype}; read the context again, or load it with the same settings"
        )
    before, now = (np.array(each) for each in (said["weights"], _some_weights(serving.model)))
    if before.shape != now.shape or not np.allclose(before, now, rtol=0.02, atol=1e-3 * np.abs(before).max()):
        raise ValueError(f"{path} was read by a model with other weights; read the context again, or load that model")
    return Context(serving, jax.device_put(snapshot), str(said["suffix"]))


def _some_weights(model: Decoder) -> list[float]:
    """Of each matrix outside the layers and in the first: so a model is known again, also in another dtype."""
    found: list[float] = []
    for path, leaf in sorted(parameters_of(model).items()):
        stacked = path[0] == "layers" and not path[1].isdigit()
        if path[0] == "layers" and not stacked and path[1] != "0":
            continue
        for array in jax.tree.leaves(leaf.get_value()):
            part = array[0] if stacked else array
            places = np.unravel_index(np.linspace(0, part.size - 1, SAMPLE).astype(int), part.shape)
            found += [float(f"{value:.4g}") for value in np.asarray(part[places], np.float32)]
    return found


def _check_devices(serving: Serving) -> None:
    """Raises ValueError where heads are split over devices: what is held apart from a cache is one device's."""
    if serving.devices.shards.count > 1:
        raise ValueError(f"a context is held by one device, not by {serving.devices.shards.count}; give LLM devices=1")
