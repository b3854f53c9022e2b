"""Prompts in, answers out: a model, its tokenizer and a compressed cache behind one class."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.allocator import blocks_needed
from jaxkv.cache import CacheConfig, PagedCache, init_cache, stats, take_sequences
from jaxkv.policies import Policy
from jaxkv.prompt import CHUNK
from jaxkv.requests import (
    Completion,
    Event,
    Finished,
    PromptRead,
    Request,
    SamplingParams,
    TextMade,
    Timings,
    sampler_for,
)
from jaxkv.steps import CompiledSteps
from models import Llama, Tokenizer, load_model, load_tokenizer, resolve, stack_layers
from pallas_kernels import default_block_size

Prompt = str | Sequence[int]
STEPS = 16
"""Decode steps in one dispatch: what a stream waits for."""


class LLM:
    """A loaded model.

    Args:
      model: a built-in name, a directory, a ``.gguf`` file, or a ``models.Llama``.
      tokenizer: for a ``models.Llama``; without one, prompts are token ids and answers have no text.
      cache_memory: bytes for the whole cache; None: what the prompts of a call need uncompressed.
      compression: a policy, or None for the full cache.
      block_size: token slots a block; None: what suits the platform's kernels.
      max_batch: sequences that are decoded together.
      dtype: of weights and cache.

    Raises:
      CheckpointError: the model can't be found or read.
      ValueError: a setting out of range.
    """

    def __init__(
        self,
        model: str | Path | Llama,
        *,
        tokenizer: Tokenizer | None = None,
        cache_memory: int | None = None,
        compression: Policy | None = None,
        block_size: int | None = None,
        max_batch: int = 16,
        dtype: jnp.dtype = jnp.float32,  # pyright: ignore[reportArgumentType]
    ):
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        began = time.perf_counter()
        if isinstance(model, Llama):
            self.model, self.tokenizer = model, tokenizer
        else:
            path = resolve(str(model))
            self.model, self.tokenizer = load_model(path, dtype=dtype), tokenizer or load_tokenizer(path)
            if _compiles_stacked_layers_well():
                self.model = stack_layers(self.model)
        self.load_seconds = time.perf_counter() - began
        self.cache_memory = cache_memory
        self.compression = compression
        self.block_size = default_block_size() if block_size is None else block_size
        self.max_batch = max_batch
        self.dtype = dtype
        self._cache: tuple[CacheConfig, PagedCache] | None = None
        self._steps: dict[tuple[int, ...], CompiledSteps] = {}

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answers prompts, each as if it were alone.

        Args:
          prompts: a text, a list of token ids, or several of either.
          params: one for all prompts, or one each.

        Returns:
          The answers in the prompts' order.

        Raises:
          ValueError: a prompt that is empty, or too long for the model or the pool; a budget that can't be met.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
        batch: Sequence[Prompt] = [prompts] if single else prompts  # pyright: ignore[reportAssignmentType]
        done = {e.request: e.completion for e in self.events(batch, params) if isinstance(e, Finished)}
        return [done[i] for i in range(len(batch))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The answer to one prompt, piece by piece; only whole characters, and nothing of a stop text."""
        for event in self.events([prompt], params):
            if isinstance(event, TextMade):
                yield event.text

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation (``role``, ``content``) in the model's own chat format, ready for the answer."""
        if self.tokenizer is None:
            raise ValueError("this LLM has no tokenizer, so it has no chat format; give prompts as token ids")
        return self.tokenizer.chat(messages)

    def events(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Event]:
        """Everything that happens on the way from prompts to answers: progress, pieces of text, completions."""
        requests = self._requests(prompts, params)
        config = self._cache_config(requests)
        cache = self._empty_cache(config)
        waiting = list(requests)
        while waiting:
            wave = _Wave(self, self._compiled(waiting[0].params), config, cache)
            while waiting and wave.has_room_for(waiting[0]):
                yield from wave.read(waiting.pop(0))
            yield from wave.answer()
            cache = wave.cache
        self._cache = (config, cache)  # only now: a call that is cut short leaves a cache that was given away

    def _requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        params = SamplingParams() if params is None else params
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"give one SamplingParams, or one a prompt: {len(prompts)} prompts, {len(each)} params")
        context = self.model.config.max_context
        requests = []
        for i, (prompt, param) in enumerate(zip(prompts, each, strict=True)):
            ids = self._encode(prompt)
            if len(ids) == 0:
                raise ValueError(f"prompt {i} is empty; give at least one token")
            if len(ids) >= context:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens, but the model's context is {context}, with at least one token "
                    "for the answer; shorten it"
                )
            vocab = self.model.config.vocab_size
            if ids.min() < 0 or ids.max() >= vocab:
                raise ValueError(f"prompt {i} has token ids outside 0..{vocab - 1}: {ids.min()}..{ids.max()}")
            if param.stop and self.tokenizer is None:
                raise ValueError("stop texts need a tokenizer, and this LLM has none")
            limit = min(param.max_tokens, context - len(ids))
            requests.append(Request(index=i, prompt=ids.astype(np.int32), params=param, limit=limit))
        return requests

    def _encode(self, prompt: Prompt) -> np.ndarray:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this LLM has no tokenizer; give prompts as token ids")
            prompt = self.tokenizer.encode(prompt)
        ids = np.asarray(prompt)
        if len(ids) and not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token ids must be whole numbers, got {ids.dtype}: {ids[:4].tolist()}")
        return ids

    def _cache_config(self, requests: Sequence[Request]) -> CacheConfig:
        """A cache for these requests; rounded up, so that calls of like sizes share compiled programs."""
        longest = max((len(r.prompt) + r.limit for r in requests), default=1)
        rows = min(self.max_batch, 1 << (max(len(requests), 1) - 1).bit_length())
        kept = self._cache[0] if self._cache is not None else None
        if kept is not None and kept.batch == rows and longest <= kept.max_context:
            config = kept
        else:
            config = CacheConfig.for_model(
                self.model.config,
                batch=rows,
                max_context=_rounded_up(longest),
                memory=self.cache_memory,
                block_size=self.block_size,
                dtype=self.dtype,
            )
        if self.compression is not None:
            self.compression.budget.check(config, self.compression.protected_window)
        for request in requests:
            # Uncompressed, the answer comes on top; compressed, what is left then is checked then.
            tokens = len(request.prompt) + (0 if self.compression else request.limit)
            need = config.heads * -(-tokens // self.block_size)
            if need > config.num_blocks - 1:
                raise ValueError(
                    f"prompt {request.index} has {len(request.prompt)} tokens and needs {need} blocks "
                    f"{'before it is compressed' if self.compression else 'with its answer'}, but the pool has "
                    f"{config.num_blocks - 1}; {_more_memory(config, need)}, or shorten it"
                )
        return config

    def _empty_cache(self, config: CacheConfig) -> PagedCache:
        kept, self._cache = self._cache, None
        return kept[1] if kept is not None and kept[0] == config else init_cache(config)

    def _stop_tokens(self, params: SamplingParams) -> tuple[int, ...]:
        if params.ignore_eos:
            return ()
        known = self.tokenizer.eos_ids if self.tokenizer is not None else ()
        return tuple(sorted({*self.model.config.eos_token_ids, *known}))

    def _compiled(self, params: SamplingParams) -> CompiledSteps:
        stop = self._stop_tokens(params)
        if stop not in self._steps:
            self._steps[stop] = CompiledSteps(self.model, self.compression, stop)
        return self._steps[stop]


class _Wave:
    """Requests that are read one after the other and then decoded together, until all are answered."""

    def __init__(self, llm: LLM, steps: CompiledSteps, config: CacheConfig, cache: PagedCache):
        self.llm, self.steps, self.config, self.cache = llm, steps, config, cache
        self.requests: list[Request] = []
        self.streams = []
        self.timings: list[Timings] = []
        self.reserved = 0

    def has_room_for(self, request: Request) -> bool:
        if not self.requests:
            return True
        same_stop = self.llm._compiled(request.params) is self.steps
        size = self.config.block_size
        blocks = self.config.heads * (-(-len(request.prompt) // size) - (-request.limit // size))
        fits = blocks <= int(self.cache.num_free) - self.reserved
        return same_stop and len(self.requests) < self.config.batch and fits

    def read(self, request: Request) -> Iterator[Event]:
        """Prompt chunks, the first token from the full cache, then compression."""
        row, total = len(self.requests), len(request.prompt)
        timings, compiled = Timings(load=self.llm.load_seconds), self.steps.compile_seconds
        self.requests.append(request)
        self.timings.append(timings)
        self.streams.append(self.llm.tokenizer.stream() if self.llm.tokenizer else None)

        began = time.perf_counter()
        chunk = min(CHUNK, -(-total // 64) * 64)
        tokens = np.zeros(-(-total // chunk) * chunk, np.int32)
        tokens[:total] = request.prompt
        state = self.steps.start(self.cache, row, total)
        yield PromptRead(request=request.index, tokens=0, total=total)
        for at in range(0, total, chunk):
            count = min(chunk, total - at)
            state = self.steps.chunk(state, row, jnp.asarray(tokens[None, at : at + chunk]), count)
            jax.block_until_ready(state.hidden)
            yield PromptRead(request=request.index, tokens=at + count, total=total)
        self.cache, token, logprob = self.steps.finish(state, row, sampler_for([request.params]))
        first, logprob = int(token[0]), float(logprob[0])
        timings.compile = self.steps.compile_seconds - compiled
        timings.prefill = time.perf_counter() - began - timings.compile

        if self.llm.compression is not None:
            began, compiled = time.perf_counter(), self.steps.compile_seconds
            self.cache = jax.block_until_ready(self.steps.compress(self.cache, row))
            compiling = self.steps.compile_seconds - compiled
            timings.compile += compiling
            timings.compress = time.perf_counter() - began - compiling
        own = take_sequences(self.cache, jnp.array([row]))
        request.cache = stats(own)
        self.reserved += int(blocks_needed(own, own.lengths + request.limit))
        if self.reserved > request.cache.blocks_free:
            need = self.config.num_blocks - 1 - request.cache.blocks_free + self.reserved
            raise ValueError(
                f"prompt {request.index} leaves {request.cache.blocks_free} blocks free once it is compressed, but "
                f"{request.limit} more tokens may need {self.reserved}; {_more_memory(self.config, need)}, or ask for "
                "fewer tokens"
            )
        yield from self.accept(row, [first], [logprob])

    def answer(self) -> Iterator[Event]:
        """Decodes all requests of the wave to their ends, and frees their blocks."""
        rows = self.config.batch
        everyone = [r.params for r in self.requests]
        sampler = sampler_for(everyone + everyone[:1] * (rows - len(everyone)))
        while any(r.finish_reason is None for r in self.requests):
            began, compiled = time.perf_counter(), self.steps.compile_seconds
            pending, limits = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
            for row, request in enumerate(self.requests):
                pending[row] = request.pending
                limits[row] = 0 if request.finish_reason else request.limit - len(request.token_ids)
            made = self.steps.decode(self.cache, jnp.asarray(pending), jnp.asarray(limits), sampler, STEPS)
            self.cache = made.cache
            tokens, logprobs, counts = jax.device_get((made.tokens, made.logprobs, made.counts))
            if not counts.any():
                raise RuntimeError("the pool ran dry while decoding, though blocks were reserved; please report this")
            compiling = self.steps.compile_seconds - compiled
            seconds = time.perf_counter() - began - compiling
            for row, request in enumerate(self.requests):
                if request.finish_reason is None:
                    self.timings[row].decode += seconds
                    self.timings[row].compile += compiling
                    count = counts[row]
                    yield from self.accept(row, tokens[row, :count].tolist(), logprobs[row, :count].tolist())
        finished = jnp.arange(rows) < rows
        self.cache = self.steps.release(self.cache, finished)

    def accept(self, row: int, tokens: list[int], logprobs: list[float]) -> Iterator[Event]:
        """Takes new tokens of a row: text, stop texts, the end."""
        request, stream = self.requests[row], self.streams[row]
        before = len(request.token_ids)
        ends = self.llm._stop_tokens(request.params)
        stopped_by_text = False
        for token, logprob in zip(tokens, logprobs, strict=True):
            if token in ends:
                request.finish_reason = "stop"
                break
            request.pending = token
            request.token_ids.append(token)
            request.logprobs.append(logprob)
            if stream is not None:
                request.text += stream.push(token)
                stopped_by_text = _cut_at_stop(request)
                if stopped_by_text:
                    request.finish_reason = "stop"
                    break
        if request.finish_reason is None and len(request.token_ids) >= request.limit:
            request.finish_reason = "length"
        if request.finish_reason and stream is not None and not stopped_by_text:
            request.text += stream.flush()
            _cut_at_stop(request)
        ready = len(request.text) if request.finish_reason else _safe_length(request.text, request.params.stop)
        if len(request.token_ids) > before or ready > request.sent:
            new = request.text[request.sent : max(ready, request.sent)]
            request.sent = max(ready, request.sent)
            yield TextMade(request=request.index, text=new, token_ids=request.token_ids[before:])
        if request.finish_reason:
            yield Finished(request=request.index, completion=self.completion(row))

    def completion(self, row: int) -> Completion:
        request = self.requests[row]
        assert request.cache is not None
        assert request.finish_reason is not None
        return Completion(
            text=request.text,
            token_ids=request.token_ids,
            prompt_tokens=len(request.prompt),
            finish_reason=request.finish_reason,
            logprobs=request.logprobs if request.params.logprobs else None,
            cache=request.cache,
            cache_at_end=stats(take_sequences(self.cache, jnp.array([row]))),
            timings=replace(self.timings[row]),
        )


def _rounded_up(tokens: int) -> int:
    """To 256, 384, 512, 768, 1024, …: few different sizes, none more than half too large."""
    size = 256
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _more_memory(config: CacheConfig, blocks: int) -> str:
    return f"give cache_memory of at least {config.bytes_with(blocks + 1)} bytes"


def _cut_at_stop(request: Request) -> bool:
    """Cuts the text at its first stop text; True where there is one."""
    found = [at for at in (request.text.find(stop) for stop in request.params.stop) if at >= 0]
    if found:
        request.text = request.text[: min(found)]
    return bool(found)


def _safe_length(text: str, stops: Sequence[str]) -> int:
    """How much of the text can be given out: not what may be the beginning of a stop text."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return len(text) - longest


def _compiles_stacked_layers_well() -> bool:
    """On TPUs, where 30 unrolled layers take long to compile; for v7x XLA lays stacked weights out anew every time."""
    return jax.default_backend() == "tpu" and "7x" not in jax.devices()[0].device_kind
