"""The functional layer, compiled for a model: each step is one program, with the cache donated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxkv.cache import prefix
from jaxkv.cache.allocator import release_sequences
from jaxkv.cache.prefix import Prefix
from jaxkv.cache.state import PagedCache, put_sequences, take_sequences
from jaxkv.generation.decode import Decoded
from jaxkv.generation.decode import compress as compress_rows
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
            part = start_prompt(merge(leaves), take_sequences(cache, row), length, policy, fresh=fresh)
            return replace(part, cache=put_sequences(cache, part.cache, row))

        def chunk(
            leaves: list[Array], state: PromptState, row: Array, tokens: Array, counts: Array, policy: Policy | None
        ) -> PromptState:
            whole = state.cache
            state = replace(state, cache=take_sequences(whole, row))
            state = prefill_chunk(merge(leaves), state, tokens, counts, policy)
            return replace(state, cache=put_sequences(whole, state.cache, row))

        def reread(
            leaves: list[Array], state: PromptState, row: Array, tokens: Array, counts: Array, policy: Policy
        ) -> PromptState:
            whole = state.cache
            state = replace(state, cache=take_sequences(whole, row))
            return replace(reread_chunk(merge(leaves), state, tokens, counts, policy), cache=whole)

        def finish(
            leaves: list[Array],
            whole: PagedCache,
            state: PromptState,
            row: Array,
            sampler: Sampler,
            policy: Policy | None,
        ) -> tuple[PagedCache, Array, Array]:
            state = replace(state, cache=take_sequences(whole, row))
            part, logits = finish_prompt(merge(leaves), state, policy)
            token = sampler(logits, part.num_tokens)
            return put_sequences(whole, part, row), token, logprobs_of(logits, token)

        def score(whole: PagedCache, state: PromptState, row: Array, policy: Policy) -> PagedCache:
            return put_sequences(whole, score_prompt(replace(state, cache=take_sequences(whole, row)), policy), row)

        def compress(cache: PagedCache, row: Array, tokens: Array, policy: Policy) -> PagedCache:
            part = take_sequences(cache, row)
            part = compress_rows(part, policy, tokens=jnp.maximum(tokens, part.num_tokens))
            return put_sequences(cache, part, row)

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

        self._start = jax.jit(start, donate_argnums=1, static_argnums=(4, 5))
        self._chunk = jax.jit(chunk, donate_argnums=1, static_argnums=5)
        self._reread = jax.jit(reread, donate_argnums=1, static_argnums=5)
        self._finish = jax.jit(finish, donate_argnums=1, static_argnums=5)
        self._score = jax.jit(score, donate_argnums=0, static_argnums=3)
        self._compress = jax.jit(compress, donate_argnums=0, static_argnums=3)
        self._decode = jax.jit(decode, donate_argnums=1, static_argnums=(5, 6))
        self._release = jax.jit(release_sequences, donate_argnums=0)
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

    def chunk(self, state: PromptState, row: int, tokens: Array, count: int, policy: Policy | None) -> PromptState:
        """Reads a chunk, ``i32[1, chunk]``."""
        return self._call(self._chunk, self.leaves, state, _one(row), tokens, _one(count), static=(policy,))

    def reread(self, state: PromptState, row: int, tokens: Array, count: int, policy: Policy) -> PromptState:
        """Reads a chunk once more, after the prompt or its part, for a policy that wants it; nothing is cached."""
        return self._call(self._reread, self.leaves, state, _one(row), tokens, _one(count), static=(policy,))

    def finish(
        self, state: PromptState, row: int, sampler: Sampler, policy: Policy | None
    ) -> tuple[PagedCache, Array, Array]:
        """Ends a prompt: the cache, the first token and its log probability, ``[1]`` each."""
        return self._call(
            self._finish, self.leaves, state.cache, _without_cache(state), _one(row), sampler, static=(policy,)
        )

    def score(self, state: PromptState, row: int, policy: Policy) -> PagedCache:
        """Ends a part of a prompt, with nothing said."""
        return self._call(self._score, state.cache, _without_cache(state), _one(row), static=(policy,))

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


def _without_cache(state: PromptState) -> PromptState:
    """What of a prompt's state isn't donated."""
    return replace(state, cache=None)  # pyright: ignore[reportArgumentType]


def _one(value: int) -> Array:
    return jnp.array([value], jnp.int32)
