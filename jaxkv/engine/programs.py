"""The functional layer, compiled for a model: each verb is one program, with the cache donated."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jaxkv.cache import prefix
from jaxkv.cache.prefix import Prefix
from jaxkv.cache.sharing import fork, own
from jaxkv.cache.snapshot import Snapshot, put
from jaxkv.cache.state import PagedCache
from jaxkv.cache.state import release as release_rows
from jaxkv.cache.stats import Counts
from jaxkv.engine.devices import Devices, OneDevice
from jaxkv.generation.compress import compress
from jaxkv.generation.decode import decode as decode_rows
from jaxkv.generation.decode import is_any
from jaxkv.generation.prefill import finish_prompt, prefill_chunk, reread_chunk
from jaxkv.generation.prompt import PromptState, start_prompt
from jaxkv.generation.sampling import Chosen, Sampler, choose
from jaxkv.generation.scoring import score_prompt
from jaxkv.policies import Policy
from models.interface import Decoder
from pallas_kernels.settings import any_ranks

MOST_PROGRAMS = 128
"""Compiled programs that are kept: a job whose lines each bring a policy of their own must not fill the memory."""

Owner = TypeVar("Owner", bound="ModelPrograms")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ModelPrograms:
    """A model whose methods that are marked ``program`` run compiled.

    The programs take the leaves that the model had at the last ``refresh``, since flattening a module costs
    milliseconds a step. They are compiled when first needed for shapes and static arguments; ``compile_seconds`` tells
    what that took. Given ``jax.ShapeDtypeStruct`` in place of arrays, one is compiled, and gives shapes.
    """

    def __init__(self, model: Decoder, devices: Devices | None = None):
        self.devices = devices or OneDevice()
        self.compile_seconds = 0.0
        self.temporary_bytes = 0
        """On a device, beside weights, cache and results: of the program that takes most."""
        self.on_compile: Callable[[str], None] | None = None
        """Is told what is going to be compiled."""
        self._programs: dict[object, jax.stages.Compiled] = {}
        self._take(model)

    def refresh(self, model: Decoder) -> None:
        """Takes the weights that a model has now; costs about a millisecond where they are those that it had before.

        Programs for a model of another structure, other shapes or dtypes are dropped.
        """
        leaves, structure = jax.tree.flatten(model)
        if structure != self._seen[1] or any(new is not old for new, old in zip(leaves, self._seen[0], strict=True)):
            before = self._kind
            self._take(model)
            if self._kind != before:
                self._programs.clear()
                self.temporary_bytes = 0

    def _take(self, model: Decoder) -> None:
        self.model = model
        """Inside a program: one whose weights are the program's arguments."""
        self._seen = jax.tree.flatten(model)
        self._graph, weights = self.devices.split(model)
        self._leaves, self._structure = jax.tree.flatten(weights)
        self._kind = self._graph, self._structure, [(leaf.shape, leaf.dtype) for leaf in self._leaves]

    def _run(self, step: Callable[..., Any], donated: dict[str, Any], given: dict[str, Any], fixed: dict[str, Any]):
        leaves, structure = jax.tree.flatten((donated, given))
        key = step, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), tuple(fixed.values())
        compiled = self._programs.pop(key, None) or self._compile(step, donated, given, fixed)
        self._programs[key] = compiled  # the latest used is the last
        while len(self._programs) > MOST_PROGRAMS:
            self._programs.pop(next(iter(self._programs)))
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            return compiled.out_info
        return compiled(self._leaves, donated, self.devices.told(given))

    def _compile(
        self, step: Callable[..., Any], donated: dict[str, Any], given: dict[str, Any], fixed: dict[str, Any]
    ) -> jax.stages.Compiled:
        @any_ranks
        def traced(leaves: list[Array], donated: dict[str, Any], given: dict[str, Any]) -> Any:
            inside = copy(self)
            inside.model = nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))
            return step(inside, **donated, **given, **fixed)

        traced.__name__ = step.__name__  # what profilers show
        if self.on_compile is not None:
            self.on_compile(step.__name__)
        began = time.perf_counter()
        compiled = self.devices.compile(traced, self._leaves, donated, given)
        self.compile_seconds += time.perf_counter() - began
        if (memory := compiled.memory_analysis()) is not None:
            self.temporary_bytes = max(self.temporary_bytes, memory.temp_size_in_bytes)
        return compiled


def program(
    *, donate: tuple[str, ...] = (), static: tuple[str, ...] = ()
) -> Callable[[Callable[Concatenate[Owner, Arguments], Result]], Callable[Concatenate[Owner, Arguments], Result]]:
    """Marks a method of ``ModelPrograms`` that runs compiled.

    Whole numbers that aren't static are told as ``i32[]``.

    Args:
      donate: names of arguments that are given away.
      static: names of arguments, hashable, for each value of which there is a program of its own.
    """

    def declare(
        step: Callable[Concatenate[Owner, Arguments], Result],
    ) -> Callable[Concatenate[Owner, Arguments], Result]:
        names = signature(step)

        @wraps(step)
        def run(self: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            bound = names.bind(self, *args, **kwargs)
            bound.apply_defaults()
            _, *rest = bound.arguments.items()
            given = {name: np.int32(x) if type(x) is int and name not in static else x for name, x in rest}
            donated = {name: given.pop(name) for name in donate}
            fixed = {name: given.pop(name) for name in static}
            return self._run(step, donated, given, fixed)

        return run

    return declare


class Steps(NamedTuple):
    """What a dispatch of decode steps leaves, for ``n`` rows."""

    cache: PagedCache
    tokens: Array
    """``i32[n, steps]``."""
    logprobs: Array
    """``f32[n, steps]``."""
    counts: Array
    """``i32[n]``: tokens made."""
    likeliest: Array
    """``i32[n, steps, top]``."""
    their_logprobs: Array
    """``f32[n, steps, top]``."""
    last: Array
    """``i32[n]``: the last of each row."""
    held: Counts
    """Of the cache, apart from it: they are there still when it is given away."""


class Programs(ModelPrograms):
    """Prompt chunks, compression and decoding, for some rows of the batch, ``i32[n]``, each of them once; a single row
    may be told as a number."""

    def __init__(self, model: Decoder, stop_tokens: tuple[int, ...] = (), devices: Devices | None = None):
        super().__init__(model, devices)
        self.stop_tokens = stop_tokens

    @program(static=("policy", "fresh"))
    def start(
        self, cache: PagedCache, rows: ArrayLike, lengths: ArrayLike, policy: Policy | None, *, fresh: bool = False
    ) -> PromptState:
        """Begins prompts, or parts of them, of ``i32[n]`` lengths; ``fresh``: in rows that hold nothing quantised."""
        return start_prompt(self.model, cache.rows(_each(rows)), _each(lengths), policy, fresh=fresh)

    @program(donate=("prompts",))
    def take_up(self, prompts: PromptState, part: PromptState, places: ArrayLike) -> PromptState:
        """What is known of several prompts, with what is known of some, at ``i32[n]`` places, from another state."""
        return prompts.with_rows(part, _each(places))

    @program()
    def one_prompt(self, prompts: PromptState, place: ArrayLike) -> PromptState:
        """What is known of one of several prompts."""
        return prompts.rows(_each(place))

    @program(donate=("cache", "prompt"), static=("policy", "length"))
    def chunk(
        self,
        cache: PagedCache,
        prompt: PromptState,
        rows: ArrayLike,
        tokens: ArrayLike,
        counts: ArrayLike,
        policy: Policy | None,
        length: int | None = None,
    ) -> tuple[PagedCache, PromptState]:
        """Reads a chunk of each prompt; see ``prefill_chunk``."""
        part = cache.rows(_each(rows))
        tokens, counts = jnp.asarray(tokens), _each(counts)
        part, prompt = prefill_chunk(self.model, part, prompt, tokens, counts, policy, length=length)
        return cache.with_rows(part, _each(rows)), prompt

    @program(donate=("prompt",), static=("policy", "length"))
    def reread(
        self,
        cache: PagedCache,
        prompt: PromptState,
        rows: ArrayLike,
        tokens: ArrayLike,
        counts: ArrayLike,
        policy: Policy,
        length: int | None = None,
    ) -> PromptState:
        """Reads a chunk once more, after the prompts or their parts, for a policy that wants it; nothing is cached."""
        part, tokens, counts = cache.rows(_each(rows)), jnp.asarray(tokens), _each(counts)
        return reread_chunk(self.model, part, prompt, tokens, counts, policy, length=length)

    @program(donate=("cache",), static=("policy", "top", "more"))
    def finish(
        self,
        cache: PagedCache,
        prompt: PromptState,
        rows: ArrayLike,
        sampler: Sampler,
        policy: Policy | None,
        top: int = 0,
        more: int = 0,
    ) -> tuple[PagedCache, Chosen]:
        """Ends prompts: the cache, and the first tokens; of the first prompt so many more."""
        part, logits = finish_prompt(self.model, cache.rows(_each(rows)), prompt, policy)
        logits, positions = (jnp.concatenate([x, jnp.repeat(x[:1], more, axis=0)]) for x in (logits, part.num_tokens))
        return cache.with_rows(part, _each(rows)), choose(sampler, logits, positions, top)

    @program(donate=("cache",), static=("policy",))
    def score(self, cache: PagedCache, prompt: PromptState, rows: ArrayLike, policy: Policy) -> PagedCache:
        """Ends parts of prompts, with nothing said."""
        part = score_prompt(self.model, cache.rows(_each(rows)), prompt, policy)
        return cache.with_rows(part, _each(rows))

    @program(donate=("cache",), static=("policy",))
    def compress_rows(
        self, cache: PagedCache, rows: ArrayLike, tokens: ArrayLike, policy: Policy, select: ArrayLike | None = None
    ) -> PagedCache:
        """Compresses rows, of them those selected, ``bool[n]``, to the budgets of what they have seen, or of so many
        tokens, ``i32[n]``, if those are more."""
        part = cache.rows(_each(rows))
        tokens = jnp.maximum(_each(tokens), part.num_tokens)
        part = compress(part, policy, None if select is None else jnp.asarray(select), tokens=tokens)
        return cache.with_rows(part, _each(rows))

    @program(donate=("cache",), static=("steps", "policy", "top"))
    def decode(
        self,
        cache: PagedCache,
        tokens: ArrayLike,
        limits: ArrayLike,
        sampler: Sampler,
        steps: int,
        policy: Policy | None,
        rows: ArrayLike | None = None,
        stops: ArrayLike | None = None,
        top: int = 0,
    ) -> Steps:
        """Up to ``steps`` tokens for every row, or for some; arguments and results are of these. See ``decode``.

        A row whose token is already one that stops it makes none: so steps may be sent on from ``last`` unseen.
        """
        part, tokens = cache if rows is None else cache.rows(_each(rows)), _each(tokens)
        may_stop = jnp.asarray(True if stops is None else stops)
        ended = may_stop & is_any(tokens, self.stop_tokens)
        made = decode_rows(
            self.model,
            part,
            tokens,
            jnp.where(ended, 0, _each(limits)),
            steps=steps,
            sampler=sampler,
            policy=policy,
            stop_tokens=self.stop_tokens,
            stops=may_stop,
            top=top,
        )
        last = jnp.take_along_axis(made.tokens, jnp.maximum(made.counts - 1, 0)[:, None], axis=1)[:, 0]
        cache = made.cache if rows is None else cache.with_rows(made.cache, _each(rows))
        return Steps(
            cache=cache,
            tokens=made.tokens,
            logprobs=made.logprobs,
            counts=made.counts,
            likeliest=made.likeliest,
            their_logprobs=made.their_logprobs,
            last=jnp.where(made.counts > 0, last, tokens),
            held=jax.tree.map(jnp.copy, Counts.of(cache).gathered(cache.shards)),
        )

    def counts(self, cache: PagedCache) -> Counts:
        """What heads hold and what is free, for ``jax.device_get``."""
        return Counts.of(cache) if self.devices.shards.count == 1 else self._counts(cache)

    @program()
    def _counts(self, cache: PagedCache) -> Counts:
        return Counts.of(cache).gathered(cache.shards)

    @program(donate=("cache",))
    def release(self, cache: PagedCache, finished: ArrayLike) -> PagedCache:
        """Empties rows, ``bool[batch]``."""
        return release_rows(cache, jnp.asarray(finished))

    @program(donate=("cache",))
    def detach(self, cache: PagedCache, row: ArrayLike) -> tuple[PagedCache, Prefix]:
        """Makes a prefix of what a row holds."""
        return prefix.detach(cache, jnp.asarray(row))

    @program(donate=("cache",))
    def attach(self, cache: PagedCache, row: ArrayLike, shared: Prefix, blocks: ArrayLike) -> PagedCache:
        """Begins a row with blocks of a prefix."""
        return prefix.attach(cache, jnp.asarray(row), shared, jnp.asarray(blocks))

    @program(donate=("cache",))
    def fork(self, cache: PagedCache, row: ArrayLike, into: ArrayLike) -> tuple[PagedCache, Array]:
        """Has other rows, ``i32[n]``, hold what a row holds."""
        return fork(cache, jnp.asarray(row), _each(into))

    @program(donate=("cache",))
    def put(self, cache: PagedCache, row: ArrayLike, taken: Snapshot) -> tuple[PagedCache, Array]:
        """Has an empty row hold what was taken."""
        return put(cache, jnp.asarray(row), taken)

    @program(donate=("cache",))
    def own(self, cache: PagedCache, row: ArrayLike) -> PagedCache:
        """Copies what a row holds together with others."""
        return own(cache, jnp.arange(cache.num_tokens.shape[0], dtype=jnp.int32) == jnp.asarray(row))[0]

    @program(donate=("cache",))
    def cut(self, cache: PagedCache, shared: Prefix, blocks: ArrayLike) -> tuple[PagedCache, Prefix]:
        """Gives back what of a prefix lies past so many blocks of each head."""
        return prefix.cut(cache, shared, jnp.asarray(blocks))


def _each(value: ArrayLike) -> Array:
    """``i32[n]``."""
    return jnp.reshape(jnp.asarray(value, jnp.int32), -1)
