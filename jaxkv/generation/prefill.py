"""Reading a prompt into the cache, chunk by chunk, and scoring its KVs by the attention that they got.

``prefill`` is the whole of it, in one program; a host that wants to show progress calls ``start_prompt``,
``prefill_chunk`` and ``finish_prompt`` itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache import allocator
from jaxkv.cache import moves as tiering
from jaxkv.cache.state import NULL_BLOCK, PagedCache, in_table_order, stamp_slots, to_slots
from jaxkv.compression.policy import ALL_QUERIES
from jaxkv.generation.query_moments import QueryMoments
from jaxkv.policies import Policy
from pallas_kernels.block_writes import write_blocks
from pallas_kernels.pool_values import read_rows
from pallas_kernels.prefill_attention import ObservedQueries, RawKVs, prefill_attention

if TYPE_CHECKING:
    from models import Llama

CHUNK = 512
"""Tokens of a prompt that go through the model at once."""


def prefill(
    model: Llama,
    cache: PagedCache,
    tokens: Array,
    lengths: Array,
    policy: Policy | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[PagedCache, Array]:
    """Reads prompts into the cache, after what each sequence already holds, and scores their KVs for the policy.

    Args:
      model: the model.
      cache: donated; its batch is that of the prompts.
      tokens: ``i32[batch, length]``, padded at the end.
      lengths: ``i32[batch]`` real tokens of each row; 0 leaves a row as it is.
      policy: whose scores to record; None records none.
      chunk: tokens that go through the model at once; static. The work follows the longest prompt, not ``length``.

    Returns:
      The cache and the logits of each row's last token, ``f32[batch, vocab]``. Where the pool or a table row is too
      small for a chunk, nothing of it or what follows is written and the logits of all rows are NaN.
    """
    length = tokens.shape[1]
    chunk = min(chunk, length)
    tokens = jnp.pad(tokens, ((0, 0), (0, -length % chunk)))
    state = start_prompt(model, cache, lengths, policy)

    def read(i: Array, state: PromptState) -> PromptState:
        part = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        return prefill_chunk(model, state, part, jnp.clip(lengths - i * chunk, 0, chunk), policy)

    chunks = -(-jnp.max(lengths) // chunk)
    state = lax.fori_loop(0, chunks, read, state)
    if policy is not None and policy.rereads:

        def reread(i: Array, state: PromptState) -> PromptState:
            part = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
            return reread_chunk(model, state, part, jnp.clip(lengths - i * chunk, 0, chunk), policy)

        state = lax.fori_loop(0, chunks, reread, state)
    return finish_prompt(model, state, policy)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PromptState:
    """A prompt that is being read, chunk by chunk."""

    cache: PagedCache
    mass: Array
    """``f32[layers, batch, heads, capacity]``: observed attention on each KV so far; no KVs wide without a policy."""
    end: Array
    """``i32[batch]``: position after the prompt's last token."""
    lengths: Array
    """``i32[batch]``: tokens of this prompt."""
    hidden: Array
    """``[batch, hidden]`` of the last token read."""
    granted: Array
    """``bool[]``: all chunks so far found room. What comes after one that did not is read no more."""
    queries: QueryMoments | None = None
    """Of this prompt's queries so far, where a policy expects others like them."""
    fresh: bool = field(default=False, metadata={"static": True})
    """The sequences held nothing before, so there is nothing quantised to read."""


def start_prompt(
    model: Llama, cache: PagedCache, lengths: Array, policy: Policy | None, *, fresh: bool = False
) -> PromptState:
    """Before the first chunk of prompts of ``i32[batch]`` lengths; ``fresh`` where the sequences hold nothing."""
    layers, batch, _ = cache.lengths.shape
    width = cache.capacity if observes_prompt(policy) else 0
    return PromptState(
        cache=cache,
        mass=jnp.zeros((layers, batch, model.config.num_heads, width)),
        end=cache.num_tokens + lengths,
        lengths=lengths,
        hidden=jnp.zeros((batch, model.config.hidden_size)),
        granted=jnp.bool_(True),
        queries=QueryMoments.none(model.config, batch) if policy is not None and policy.expected_queries else None,
        fresh=fresh,
    )


def observes_prompt(policy: Policy | None) -> bool:
    """Whether attention to the prompt's KVs is added up while it is read."""
    return policy is not None and (policy.observed_queries != 0 or policy.rereads)


def prefill_chunk(model: Llama, state: PromptState, tokens: Array, counts: Array, policy: Policy | None) -> PromptState:
    """Reads one chunk, ``i32[batch, chunk]``, of which the first ``i32[batch]`` counts are real."""
    cache, chunk, end = state.cache, tokens.shape[1], state.end
    place = jnp.arange(chunk)
    positions = cache.num_tokens[:, None] + place
    starts = cache.lengths
    granted = state.granted
    if cache.tiers is not None and not state.fresh:  # of what is unquantised alone the table row is the bound
        granted &= tiering.within_capacity(cache, tiering.total(cache) + counts[None, :, None], counts > 0)
    cache, found = allocator.grow(cache, starts + jnp.where(granted, counts, 0)[None, :, None], most=chunk)
    granted &= found
    counts = jnp.where(granted, counts, 0)
    cache = stamp_slots(cache, starts, positions, counts)

    before = replace(cache, lengths=starts)
    held = _held(before, fresh=state.fresh)
    sinks = 0 if policy is None else policy.sinks
    typical = (place < counts[:, None]) & (positions >= sinks)

    def attend(
        state: tuple[Array, Array, QueryMoments | None], layer: int | Array, query: Array, key: Array, value: Array
    ) -> tuple[tuple[Array, Array, QueryMoments | None], Array]:
        pool, mass, queries = state
        # Written before it is read, and read to the end before the next layer writes: else XLA copies the pool.
        pool = write_blocks(pool, key, value, cache.block_table[layer], starts[layer], counts)
        cached, cached_positions = _layer(replace(before, pool=pool), held, layer)
        observed = _observed(policy, positions, cached_positions, counts, end)
        out, masses = prefill_attention(query, key, value, cached, observe=observed)
        if masses is not None:
            on_cached, on_own = masses
            mass = mass.at[layer].add(_join(on_cached, on_own, cached.lengths, counts))
            out = out + _zero_from(on_cached).astype(out.dtype)
        if queries is not None:
            queries = queries.with_layer(layer, query, positions, typical)
        return (pool, mass, queries), out

    (pool, mass, queries), hidden = model(tokens, positions, attend, (cache.pool, state.mass, state.queries))
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return replace(
        state,
        cache=replace(cache, pool=pool, num_tokens=cache.num_tokens + counts),
        mass=mass,
        hidden=jnp.where((counts > 0)[:, None], last, state.hidden),
        granted=granted,
        queries=None if queries is None else queries.plus(typical),
    )


def reread_chunk(model: Llama, state: PromptState, tokens: Array, counts: Array, policy: Policy) -> PromptState:
    """Reads a chunk as if it followed the prompt, only to see what it attends to: nothing of it is cached."""
    length = tokens.shape[1]
    real = jnp.arange(length) < counts[:, None]
    rows = jnp.where(real & state.granted, jnp.arange(length), -1)
    mass, _ = _look(model, state.cache, tokens, state.mass, rows, policy, fresh=state.fresh)
    return replace(state, mass=mass)


def look_ahead(model: Llama, cache: PagedCache, tokens: Array) -> Array:
    """What the model makes of tokens that would follow, ``[batch, length, hidden]``; the cache stays as it is.

    ``tokens`` is ``i32[batch, length]``; what a row has past its real tokens changes nothing before it. A cache of one
    sequence serves any number of rows, each a continuation of its own.
    """
    return _look(model, cache, tokens, jnp.zeros(()), None, None)[1]


def _look(
    model: Llama,
    cache: PagedCache,
    tokens: Array,
    mass: Array,
    rows: Array | None,
    policy: Policy | None,
    *,
    fresh: bool = False,
) -> tuple[Array, Array]:
    """The masses with those of the observed rows added, and the hidden states of tokens that aren't cached."""
    positions = jnp.broadcast_to(cache.num_tokens[:, None] + jnp.arange(tokens.shape[1]), tokens.shape)
    held = _held(cache, fresh=fresh)

    def attend(state: Array, layer: int | Array, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        (pool, *rows_of), cached_positions = _layer(cache, held, layer)
        table, lengths = (jnp.broadcast_to(x, (len(tokens), *x.shape[1:])) for x in rows_of)
        cached = RawKVs(pool, table, lengths)
        observed = None
        if policy is not None and rows is not None:
            observed = ObservedQueries(
                rows=rows,
                positions=positions,
                cached_positions=cached_positions,
                function=policy.of_probability,
                buffer=policy.observed_buffer,
            )
        out, masses = prefill_attention(query, key, value, cached, observe=observed)
        return state if masses is None else state.at[layer].add(masses[0]), out

    return model(tokens, positions, attend, mass)


def _held(cache: PagedCache, *, fresh: bool) -> tiering.Held | None:
    """Where the KVs of a cache with quantised tiers are; None where all are in the pool."""
    return tiering.held(cache) if cache.tiers is not None and not fresh else None


def _layer(cache: PagedCache, held: tiering.Held | None, layer: int | Array) -> tuple[RawKVs, Array]:
    """A layer's KVs as ``prefill_attention`` takes them, and the positions of its KVs."""
    if held is not None:
        return tiering.unquantised_layer(cache, held, layer), held.positions[layer]
    table, lengths = cache.block_table[layer], cache.lengths[layer]
    return RawKVs(cache.pool, table, lengths), in_table_order(cache.positions, table, lengths, cache.block_size)


def finish_prompt(model: Llama, state: PromptState, policy: Policy | None) -> tuple[PagedCache, Array]:
    """After the last chunk: scores from the observed attention and the KVs, and the logits of the last tokens."""
    logits = model.logits(state.hidden)
    return score_prompt(state, policy), jnp.where(state.granted, logits, jnp.nan)


def score_prompt(state: PromptState, policy: Policy | None) -> PagedCache:
    """The cache with scores from attention and KVs: of a prompt, or of a part of one that is read in parts.

    A policy that observes the last queries, or expects others, scores by those of the last part alone, one that
    observes all, or reads twice, by their sum.
    """
    cache, queries = state.cache, state.queries
    if policy is None or not (observes_prompt(policy) or policy.expected_queries or policy.reads_kvs):
        return cache
    layers, batch, kv_heads = cache.lengths.shape
    held = jnp.arange(cache.capacity) < tiering.total(cache)[..., None]
    scores = jnp.zeros(held.shape)
    where = _held(cache, fresh=state.fresh)
    kvs = partial(_kvs, cache, held, where)
    each = jnp.arange(layers)  # a layer at a time: what is copied out of the pool is one layer's
    if queries is not None:

        def expected(layer: Array) -> Array:
            keys, _, positions = kvs(layer)
            seen = held[layer] & (positions >= policy.sinks)
            return queries.attention(layer, keys, seen, cache.num_tokens, policy.expected_queries)

        scores = policy.of_prompt(lax.map(expected, each), held)
    elif observes_prompt(policy):
        scores = policy.of_prompt(state.mass.reshape(layers, batch, kv_heads, -1, cache.capacity), held)
    if policy.reads_kvs:
        scores = lax.map(lambda layer: policy.of_kvs(scores[layer], *kvs(layer), held[layer]), each)
    scores = jnp.where(held, scores, 0.0)
    window = policy.observed_queries
    adds = window is ALL_QUERIES or policy.rereads
    if where is not None:
        scores, since = scores + where.scores if adds else scores, where.positions
        if window is not None and not adds:
            scores = policy.of_fewer(scores, since, cache.num_tokens, jnp.minimum(state.lengths, window))
            since = policy.since(since, cache.num_tokens)
        reads = state.lengths[:, None, None] > 0
        scores, since = jnp.where(reads, scores, where.scores), jnp.where(reads, since, where.positions)
        return tiering.put_scores(cache, scores, since)
    table = cache.block_table, jnp.where(state.lengths[:, None] > 0, cache.lengths, 0)
    if adds:
        scores += in_table_order(cache.scores, *table, cache.block_size)
    return replace(cache, scores=to_slots(cache.scores, *table, scores))


def _kvs(cache: PagedCache, held: Array, where: tiering.Held | None, layer: Array) -> tuple[Array, Array, Array]:
    """A layer's keys, values and positions as ``Policy.of_kvs`` takes them."""
    (pool, table, _), positions = _layer(cache, where, layer)
    blocks = jnp.where(held[layer][..., :: cache.block_size], table, NULL_BLOCK)
    rows = read_rows(pool[blocks]).reshape(*held.shape[1:], -1)
    rows = jnp.where(held[layer][..., None], rows, 0.0)
    keys, values = jnp.split(rows, 2, axis=-1)
    return keys, values, positions


def _observed(
    policy: Policy | None, positions: Array, cached_positions: Array, counts: Array, end: Array
) -> ObservedQueries | None:
    """The chunk's queries that are among the prompt's last ``observed_queries``."""
    if policy is None or policy.observed_queries == 0:
        return None
    batch, chunk = positions.shape
    window = chunk if policy.observed_queries is None else policy.observed_queries
    if window < chunk:
        rows = (end - window - positions[:, 0])[:, None] + jnp.arange(window)
        real = (rows >= 0) & (rows < counts[:, None])
    else:
        rows = jnp.broadcast_to(jnp.arange(chunk), (batch, chunk))
        real = rows < counts[:, None]
        if policy.observed_queries is not None:
            real &= positions >= end[:, None] - window
    return ObservedQueries(
        rows=jnp.where(real, rows, -1),
        positions=positions,
        cached_positions=cached_positions,
        function=policy.of_probability,
        buffer=policy.observed_buffer,
    )


def _join(on_cached: Array, on_own: Array, start: Array, counts: Array) -> Array:
    """Masses ``[batch, heads, capacity]`` and ``[batch, heads, chunk]`` as one in table order."""
    batch, heads, chunk = on_own.shape
    start = jnp.repeat(start, heads // start.shape[1], axis=1)
    place = jnp.arange(chunk)
    column = jnp.where(place < counts[:, None, None], start[..., None] + place, on_cached.shape[-1])
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    return on_cached.at[row, head, column].add(on_own, mode="drop")


def _zero_from(computed: Array) -> Array:
    """A zero that is known only once the array is computed; XLA on CPU ignores optimization barriers."""
    return jnp.minimum(jnp.abs(computed.reshape(-1)[0]), 0.0).astype(jnp.int32)
