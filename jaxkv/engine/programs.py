"""The functional layer, compiled for a model: each step is one program, with the cache donated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxkv.cache import prefix
from jaxkv.cache.prefix import Prefix
from jaxkv.cache.state import PagedCache, release
from jaxkv.generation.compress import compress as compress_rows
from jaxkv.generation.decode import Decoded
from jaxkv.generation.decode import decode as decode_rows
from jaxkv.generation.prefill import PromptState, finish_prompt, prefill_chunk, reread_chunk, score_prompt, start_prompt
from jaxkv.generation.sampling import Sampler, logprobs_of
from jaxkv.policies import Policy
from models import Llama

MOST_PROGRAMS = 128
"""Compiled programs that are kept: a job whose lines each bring a policy of their own must not fill the memory."""


class CompiledSteps:
    """Prompt chunks, compression and decoding for one row or for the whole batch.

    The model is split once; the programs take its leaves, since flattening a module costs milliseconds a step.
    Programs are compiled when first needed for a shape and a policy; ``compile_seconds`` tells what that took.
    """

    def __init__(self, model: Llama, stop_tokens: tuple[int, ...]):
        graph, weights = nnx.split(model)
        self.leaves, treedef = jax.tree.flatten(weights)
        self.compile_seconds = 0.0
        self._programs: dict[object, Callable[..., Any]] = {}

        def merge(leaves: list[Array]) -> Llama:
            return nnx.merge(graph, jax.tree.unflatten(treedef, leaves))

        def start(
            leaves: list[Array], cache: PagedCache, row: Array, length: Array, policy: Policy | None, fresh: bool
        ) -> PromptState:
            return start_prompt(merge(leaves), cache.rows(row), length, policy, fresh=fresh)

        def chunk(
            leaves: list[Array],
            whole: PagedCache,
            prompt: PromptState,
            row: Array,
            tokens: Array,
            counts: Array,
            policy: Policy | None,
        ) -> tuple[PagedCache, PromptState]:
            part, prompt = prefill_chunk(merge(leaves), whole.rows(row), prompt, tokens, counts, policy)
            return whole.with_rows(part, row), prompt

        def reread(
            leaves: list[Array],
            prompt: PromptState,
            whole: PagedCache,
            row: Array,
            tokens: Array,
            counts: Array,
            policy: Policy,
        ) -> PromptState:
            return reread_chunk(merge(leaves), whole.rows(row), prompt, tokens, counts, policy)

        def finish(
            leaves: list[Array],
            whole: PagedCache,
            prompt: PromptState,
            row: Array,
            sampler: Sampler,
            policy: Policy | None,
        ) -> tuple[PagedCache, Array, Array]:
            part, logits = finish_prompt(merge(leaves), whole.rows(row), prompt, policy)
            token = sampler(logits, part.num_tokens)
            return whole.with_rows(part, row), token, logprobs_of(logits, token)

        def score(
            leaves: list[Array], whole: PagedCache, prompt: PromptState, row: Array, policy: Policy
        ) -> PagedCache:
            return whole.with_rows(score_prompt(merge(leaves), whole.rows(row), prompt, policy), row)

        def compress(cache: PagedCache, row: Array, tokens: Array, policy: Policy) -> PagedCache:
            part = cache.rows(row)
            part = compress_rows(part, policy, tokens=jnp.maximum(tokens, part.num_tokens))
            return cache.with_rows(part, row)

        def decode(
            leaves: list[Array],
            cache: PagedCache,
            tokens: Array,
            limits: Array,
            sampler: Sampler,
            steps: int,
            policy: Policy | None,
        ) -> Decoded:
            return decode_rows(
                merge(leaves),
                cache,
                tokens,
                limits,
                steps=steps,
                sampler=sampler,
                policy=policy,
                stop_tokens=stop_tokens,
            )

        self._start = jax.jit(start, static_argnums=(4, 5))
        self._chunk = jax.jit(chunk, donate_argnums=(1, 2), static_argnums=6)
        self._reread = jax.jit(reread, donate_argnums=1, static_argnums=6)
        self._finish = jax.jit(finish, donate_argnums=1, static_argnums=5)
        self._score = jax.jit(score, donate_argnums=1, static_argnums=4)
        self._compress = jax.jit(compress, donate_argnums=0, static_argnums=3)
        self._decode = jax.jit(decode, donate_argnums=1, static_argnums=(5, 6))
        self._release = jax.jit(release, donate_argnums=0)
        self._detach = jax.jit(prefix.detach, donate_argnums=0)
        self._attach = jax.jit(prefix.attach, donate_argnums=0)
        self._own = jax.jit(prefix.own, donate_argnums=0)
        self._cut = jax.jit(prefix.cut, donate_argnums=0)

    def _call(self, step: Any, *args: Any, static: tuple[Any, ...] = ()) -> Any:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        key = (step, shapes, jax.tree.structure(args), static)
        program = self._programs.pop(key, None)
        if program is None:
            began = time.perf_counter()
            program = step.lower(*args, *static).compile()
            self.compile_seconds += time.perf_counter() - began
        self._programs[key] = program  # the latest used is the last
        while len(self._programs) > MOST_PROGRAMS:
            self._programs.pop(next(iter(self._programs)))
        return program(*args)

    def start(
        self, cache: PagedCache, row: int, length: int, policy: Policy | None, *, fresh: bool = False
    ) -> PromptState:
        """Begins a prompt, or a part of one, of ``length`` tokens; ``fresh``: in a row that holds nothing quantised."""
        return self._call(self._start, self.leaves, cache, _one(row), _one(length), static=(policy, fresh))

    def chunk(
        self, cache: PagedCache, prompt: PromptState, row: int, tokens: Array, count: int, policy: Policy | None
    ) -> tuple[PagedCache, PromptState]:
        """Reads a chunk, ``i32[1, chunk]``."""
        args = self.leaves, cache, prompt, _one(row), tokens, _one(count)
        return self._call(self._chunk, *args, static=(policy,))

    def reread(
        self, cache: PagedCache, prompt: PromptState, row: int, tokens: Array, count: int, policy: Policy
    ) -> PromptState:
        """Reads a chunk once more, after the prompt or its part, for a policy that wants it; nothing is cached."""
        args = self.leaves, prompt, cache, _one(row), tokens, _one(count)
        return self._call(self._reread, *args, static=(policy,))

    def finish(
        self, cache: PagedCache, prompt: PromptState, row: int, sampler: Sampler, policy: Policy | None
    ) -> tuple[PagedCache, Array, Array]:
        """Ends a prompt: the cache, the first token and its log probability, ``[1]`` each."""
        return self._call(self._finish, self.leaves, cache, prompt, _one(row), sampler, static=(policy,))

    def score(self, cache: PagedCache, prompt: PromptState, row: int, policy: Policy) -> PagedCache:
        """Ends a part of a prompt, with nothing said."""
        return self._call(self._score, self.leaves, cache, prompt, _one(row), static=(policy,))

    def compress(self, cache: PagedCache, row: int, tokens: int, policy: Policy) -> PagedCache:
        """Compresses one row of the batch to the budget of what it has seen, or of so many tokens if those are more."""
        return self._call(self._compress, cache, _one(row), _one(tokens), static=(policy,))

    def decode(
        self, cache: PagedCache, tokens: Array, limits: Array, sampler: Sampler, steps: int, policy: Policy | None
    ) -> Decoded:
        """Up to ``steps`` tokens for every row."""
        return self._call(self._decode, self.leaves, cache, tokens, limits, sampler, static=(steps, policy))

    def release(self, cache: PagedCache, finished: Array) -> PagedCache:
        """Empties rows of the batch."""
        return self._call(self._release, cache, finished)

    def detach(self, cache: PagedCache, row: int) -> tuple[PagedCache, Prefix]:
        """Makes a prefix, on the host, of what a row holds."""
        cache, made = self._call(self._detach, cache, jnp.int32(row))
        return cache, jax.device_get(made)

    def attach(self, cache: PagedCache, row: int, prefix: Prefix, blocks: int) -> PagedCache:
        """Begins a row with blocks of a prefix."""
        return self._call(self._attach, cache, jnp.int32(row), prefix, jnp.int32(blocks))

    def own(self, cache: PagedCache, row: int) -> PagedCache:
        """Copies what a row borrows."""
        return self._call(self._own, cache, jnp.int32(row))

    def cut(self, cache: PagedCache, prefix: Prefix, blocks: int) -> tuple[PagedCache, Prefix]:
        """Gives back what of a prefix lies past so many blocks of each head."""
        cache, left = self._call(self._cut, cache, prefix, jnp.int32(blocks))
        return cache, jax.device_get(left)


def _one(value: int) -> Array:
    return jnp.array([value], jnp.int32)
