"""One pass of the model over the cache: it begins with room for its KVs, attends in every layer, and ends.

``attend`` is what the model is given: it takes what the layers change, ``state``, and gives it back. The pool is in it,
so that it is updated in place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jaxkv.cache.contents import contents, readable, unquantised
from jaxkv.cache.home import HIGH, LOW
from jaxkv.cache.quantised import NoStore
from jaxkv.cache.raw import add_to_slots
from jaxkv.cache.state import PagedCache
from jaxkv.compression.placement import Claim
from jaxkv.compression.policy import Policy
from jaxkv.generation.prompt import PromptState, observation_of, rotary
from jaxkv.generation.query_moments import QueryMoments
from models.interface import Decoder
from pallas_kernels.block_writes import write_blocks
from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention import Weakest, paged_attention
from pallas_kernels.prefill_attention import ObservedQueries, prefill_attention
from pallas_kernels.quantised_writes import lower_kvs, write_kvs


class Step(Protocol):
    """A pass of one token a sequence."""

    granted: Array
    """``bool[]``: there was room; else nothing is written."""
    state: Any
    """For the first layer."""

    def attend(self, state: Any, layer: int | Array, query: Array, key: Array, value: Array) -> tuple[Any, Array]:
        """See ``models.Attend``."""
        ...

    def end(self, state: Any) -> PagedCache:
        """The cache after it, from the last layer's state."""
        ...


def begin_step(cache: PagedCache, claim: Claim, active: Array, policy: Policy | None) -> Step:
    """The pass that caches a token in the room that was claimed for it."""
    return AppendToken(cache, claim, active, policy) if claim.step is None else QuantiseToken(cache, claim, active)


class ReadChunk:
    """A chunk of prompts is cached; it attends to all that was cached before and, causally, to itself."""

    def __init__(
        self, model: Decoder, cache: PagedCache, prompt: PromptState, length: int, counts: Array, policy: Policy | None
    ):
        self.prompt, self.quantised = prompt, cache.quantised
        cache = unquantised(cache) if prompt.fresh else cache
        place, starts = jnp.arange(length, dtype=jnp.int32), cache.raw.tables.lengths
        self.positions = cache.num_tokens[:, None] + place
        granted = prompt.granted & cache.within_capacity(cache.lengths + counts[None, :, None], counts > 0)
        more = jnp.where(granted, counts, 0)[None, :, None, None]
        tables, found = cache.raw.tables.grow(starts + more, most=length)
        self.granted = granted & found
        self.counts = jnp.where(self.granted, counts, 0)
        raw = replace(cache.raw, tables=tables).stamp(starts[..., 0], self.positions, self.counts)
        self.cache = replace(cache, raw=raw)
        self.before = replace(cache, raw=replace(raw, tables=replace(tables, lengths=starts)))
        """What the chunk finds cached; the new blocks are in its tables too."""
        self.now = contents(self.before)
        self.observes, self.policy = observation_of(policy), policy
        sinks = 0 if policy is None else policy.sinks
        self.typical = (place < self.counts[:, None]) & (self.positions >= sinks)
        """``bool[batch, length]``: the queries that are like those to expect."""
        self.rotation = None if prompt.queries is None else rotary(model).rotation
        self.state = raw.pool, prompt.mass, prompt.queries

    def attend(
        self,
        state: tuple[Array, Array | None, QueryMoments | None],
        layer: int | Array,
        query: Array,
        key: Array,
        value: Array,
    ) -> tuple[tuple[Array, Array | None, QueryMoments | None], Array]:
        pool, mass, queries = state
        raw, starts = self.cache.raw, self.before.raw.lengths[layer]
        own = query
        query, key, value = (raw.turned(x) for x in (query, key, value))
        # Written before it is read, and read to the end before the next layer writes: else XLA copies the pool.
        pool = write_blocks(pool, key, value, raw.tables.block_table[layer], starts, self.counts)
        before = replace(self.before, raw=replace(self.before.raw, pool=pool))
        cached, positions = readable(before, self.now, layer)
        out, masses = prefill_attention(query, key, value, cached, observe=self._observed(positions))
        if mass is not None and masses is not None:
            on_cached, on_own = masses
            mass = mass.at[layer].add(_join(on_cached, on_own, cached.lengths, self.counts))
            out = out + _zero_from(on_cached).astype(out.dtype)
        if queries is not None and self.rotation is not None:
            queries = queries.with_layer(layer, own, self.rotation(layer, self.positions), self.typical)
        return (pool, mass, queries), raw.turned(out)

    def _observed(self, cached_positions: Array) -> ObservedQueries | None:
        rows = self.observes.rows(self.positions, self.counts, self.prompt.end)
        if rows is None or self.policy is None:
            return None
        return observed(self.policy, rows, self.positions, cached_positions)

    def end(
        self, state: tuple[Array, Array | None, QueryMoments | None], hidden: Array
    ) -> tuple[PagedCache, PromptState]:
        pool, mass, queries = state
        counts = self.counts
        last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        cache = replace(
            self.cache,
            raw=replace(self.cache.raw, pool=pool),
            quantised=self.quantised,
            num_tokens=self.cache.num_tokens + counts,
        )
        prompt = replace(
            self.prompt,
            mass=mass,
            hidden=jnp.where((counts > 0)[:, None], last, self.prompt.hidden),
            granted=self.granted,
            queries=None if queries is None else queries.plus(self.typical),
        )
        return cache, prompt


class LookAhead:
    """Tokens that would follow attend to what is cached; nothing of them is.

    A cache of one sequence serves any number of rows, each a continuation of its own.

    Args:
      mass: what the observed rows' attention is added to, as ``PromptState.mass``.
      rows: ``i32[batch, observed]`` of the tokens, -1 for none; None: nobody is observed.
    """

    def __init__(
        self,
        cache: PagedCache,
        shape: tuple[int, ...],
        *,
        fresh: bool = False,
        mass: Array | None = None,
        rows: Array | None = None,
        policy: Policy | None = None,
    ):
        self.cache = unquantised(cache) if fresh else cache
        self.batch, length = shape
        self.positions = jnp.broadcast_to(cache.num_tokens[:, None] + jnp.arange(length, dtype=jnp.int32), shape)
        self.now = contents(self.cache)
        self.rows, self.policy = rows, policy
        self.state = jnp.zeros((), jnp.float32) if mass is None else mass
        self.granted = jnp.bool_(True)

    def attend(self, state: Array, layer: int | Array, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        query, key, value = (self.cache.raw.turned(x) for x in (query, key, value))
        cached, positions = readable(self.cache, self.now, layer)
        table, lengths = (jnp.broadcast_to(x, (self.batch, *x.shape[1:])) for x in cached[1:])
        seen = None
        if self.policy is not None and self.rows is not None:
            seen = observed(self.policy, self.rows, self.positions, positions)
        out, masses = prefill_attention(query, key, value, RawKVs(cached.pool, table, lengths), observe=seen)
        return state if masses is None else state.at[layer].add(masses[0]), self.cache.raw.turned(out)


class AppendToken:
    """One token a sequence is cached unquantised and attends to everything, quantised or not.

    Args:
      cache: as it was.
      claim: the room that it was given.
      active: ``bool[batch]``.
      policy: what observes it, if it does.
    """

    def __init__(self, cache: PagedCache, claim: Claim, active: Array, policy: Policy | None):
        self.granted, self.counts = claim.granted, (active & claim.granted).astype(jnp.int32)
        self.starts, self.positions = cache.raw.lengths, cache.num_tokens[:, None]
        raw = claim.cache.raw.stamp(self.starts, self.positions, self.counts)
        self.cache = replace(claim.cache, raw=raw)
        self.lengths = jnp.where(self.counts[None, :, None] > 0, raw.lengths, 0)
        """What each head attends to: nothing in rows that aren't active."""
        self.policy = policy if policy is not None and policy.observes_decoding else None
        observed = self.policy is not None and not isinstance(claim.cache.quantised, NoStore)
        self.state = raw.pool, raw.scores, claim.cache.tiers.pool if observed else None

    def attend(
        self, state: tuple[Array, Array, Array | None], layer: int | Array, query: Array, key: Array, value: Array
    ) -> tuple[tuple[Array, Array, Array | None], Array]:
        pool, scores, quantised = state
        turned = self.cache.raw.turned
        query, key, value = (turned(x) for x in (query, key, value))
        table, length = self.cache.raw.tables.block_table[layer], self.lengths[layer]
        pool = write_blocks(pool, key, value, table, self.starts[layer], self.counts)
        held = RawKVs(pool, table, length)
        tiers = self.cache.quantised.view(layer, self.counts > 0)
        if self.policy is None:
            out, _ = paged_attention(query[:, 0], held, tiers=tiers)
            return (pool, scores, quantised), turned(out[:, None])
        scorer, up_to = self.policy.scorer, None
        if tiers is None or quantised is None:
            out, masses = paged_attention(query[:, 0], held, observe=scorer.score_decoded)
        else:
            tiers = replace(tiers, pool=quantised)
            out, (masses, quantised) = paged_attention(query[:, 0], held, tiers=tiers, observe=scorer.score_decoded)
        if scorer.observes.buffer:
            up_to = self.cache.raw.positions, self.positions[:, 0] - scorer.observes.buffer
        return (pool, add_to_slots(scores, table, length, masses, up_to), quantised), turned(out[:, None])

    def end(self, state: tuple[Array, Array, Array | None]) -> PagedCache:
        pool, scores, quantised = state
        raw, store = replace(self.cache.raw, pool=pool, scores=scores), self.cache.quantised
        if quantised is not None:
            store = replace(self.cache.tiers, pool=quantised)
        return replace(self.cache, raw=raw, quantised=store, num_tokens=self.cache.num_tokens + self.counts)


class QuantiseToken:
    """One token a sequence is written at the high tier's precision, then attends to the quantised KVs and to itself as
    it is stored; their scores are added to. Arguments as for ``AppendToken``."""

    def __init__(self, cache: PagedCache, claim: Claim, active: Array):
        assert claim.step is not None
        assert claim.significance is not None
        self.granted, self.acts = claim.granted, active & claim.granted
        self.positions, self.significance = cache.num_tokens, claim.significance
        self.cache, select, step = claim.cache, self.acts[None, :, None], claim.step
        store = claim.cache.tiers
        block, self.offsets = store.tables.slots(HIGH, step.new)
        self.blocks = jnp.where(select, block, 0)
        """``i32[layers, batch, kv_heads]`` where each head's new KV goes; the null block for none."""
        self.state = make_room(claim, active), store.weakest

    def attend(
        self, state: tuple[Array, Weakest], layer: int | Array, query: Array, key: Array, value: Array
    ) -> tuple[tuple[Array, Weakest], Array]:
        pool, weakest = state
        store, kv_heads, turned = self.cache.tiers, key.shape[2], self.cache.raw.turned
        query, key, value = (turned(x) for x in (query, key, value))
        each = jnp.repeat(self.positions, kv_heads)
        key, value = (x.reshape(-1, store.layout.head_dim) for x in (key, value))
        blocks, offsets = self.blocks[layer].reshape(-1), self.offsets[layer].reshape(-1)
        pool = write_kvs(pool, key, value, each, blocks, offsets, store.layout)
        tiers = replace(store, pool=pool).view(layer, self.acts)
        next_position = self.positions + 1
        out, seen = paged_attention(
            query[:, 0], None, tiers=tiers, observe=self.significance, next_position=next_position
        )

        def put(old: Array, found: Array) -> Array:
            return old.at[layer].set(jnp.where(self.acts[:, None, None], found, old[layer]))

        return (seen.pool, jax.tree.map(put, weakest, seen.weakest)), turned(out[:, None])

    def end(self, state: tuple[Array, Weakest]) -> PagedCache:
        pool, weakest = state
        store = replace(self.cache.tiers, pool=pool, weakest=weakest)
        return replace(self.cache, quantised=store, num_tokens=self.positions + self.acts.astype(jnp.int32))


def make_room(claim: Claim, active: Array) -> Array:
    """The quantised pool with the KVs requantised that make room for new tokens, in all heads of all layers at once
    (LeanKV, section 5: plan, prefix sum, execute; the claim was the first two)."""
    assert claim.step is not None
    store, step = claim.cache.tiers, claim.step
    lowers = (active & claim.granted)[None, :, None] & (step.to >= 0)
    from_block, from_offset = store.tables.slots(HIGH, step.lowered)
    to_block, to_offset = store.tables.slots(LOW, jnp.maximum(step.to, 0))
    moves = jnp.where(lowers, from_block, 0), from_offset, jnp.where(lowers, to_block, 0), to_offset
    return lower_kvs(store.pool, *(part.reshape(-1) for part in moves), layout=store.layout)


def observed(policy: Policy, rows: Array, positions: Array, cached_positions: Array) -> ObservedQueries:
    """What the kernel is told of the queries that a policy observes."""
    scorer = policy.scorer
    return ObservedQueries(
        rows=rows,
        positions=positions,
        cached_positions=cached_positions,
        function=scorer.weigh,
        buffer=scorer.observes.buffer,
    )


def _join(on_cached: Array, on_own: Array, start: Array, counts: Array) -> Array:
    """Masses ``[batch, heads, capacity]`` and ``[batch, heads, chunk]`` as one in table order."""
    batch, heads, chunk = on_own.shape
    start = jnp.repeat(start, heads // start.shape[1], axis=1)
    place = jnp.arange(chunk, dtype=jnp.int32)
    column = jnp.where(place < counts[:, None, None], start[..., None] + place, on_cached.shape[-1])
    row, head = jnp.arange(batch, dtype=jnp.int32)[:, None, None], jnp.arange(heads, dtype=jnp.int32)[:, None]
    return on_cached.at[row, head, column].add(on_own, mode="drop")


def _zero_from(computed: Array) -> Array:
    """A zero that is known only once the array is computed; XLA on CPU ignores optimization barriers."""
    return jnp.minimum(jnp.abs(computed.reshape(-1)[0]), 0.0).astype(jnp.int32)
