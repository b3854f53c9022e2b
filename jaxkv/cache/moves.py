"""Deciding anew where a sequence's KVs live, unquantised, high tier, low tier or nowhere, and moving them there.

One sequence at a time, layer by layer: a layer's KVs are read out, its quantised blocks go back to the free list, and
the KVs are written into blocks allocated anew. Reading a quantised KV and quantising it again at the same width gives
the same codes, so what stays in its tier is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache import allocator
from jaxkv.cache import quantised as tiers
from jaxkv.cache.quantised import HIGH, LOW, Tiers
from jaxkv.cache.state import PagedCache, in_table_order, num_blocks, to_slots
from pallas_kernels.block_moves import Moves, move_kvs
from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention import Weakest
from pallas_kernels.pool_values import read_rows, to_rows
from pallas_kernels.quantised_block import blocks
from pallas_kernels.walk import walk

RAW, GONE = 2, 3
"""Where a KV lives, beside ``HIGH`` and ``LOW``."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Held:
    """All KVs of the sequences' heads, ``[layers, batch, kv_heads, kvs]``: first the high tier's, then the low one's,
    then the unquantised ones. A policy's ``assign`` is given one sequence's."""

    home: Array
    """``i32``: ``HIGH``, ``LOW``, ``RAW``, or ``GONE`` past a head's end."""
    index: Array
    """``i32`` within its home."""
    scores: Array
    positions: Array
    num_tokens: Array
    """``i32[batch]``: tokens of each text so far."""
    whole: Array
    """``i32[batch]``: tokens whose budget applies; more than those so far where a prompt is read in parts."""
    table_bytes: int = field(default=0, metadata={"static": True})
    """Of a sequence's unquantised table row."""
    block_size: int = field(default=1, metadata={"static": True})
    """KVs in an unquantised block."""
    block_bytes: int = field(default=0, metadata={"static": True})
    """Of an unquantised block, with scores and positions."""

    @property
    def lengths(self) -> Array:
        """``i32[layers, batch, kv_heads]``: KVs of each head."""
        return jnp.sum(self.home != GONE, axis=-1, dtype=jnp.int32)


def total(cache: PagedCache) -> Array:
    """``i32[layers, batch, kv_heads]``: KVs that a head holds, quantised or not."""
    return cache.lengths if cache.tiers is None else cache.lengths + cache.tiers.lengths.sum(-1)


def within_capacity(cache: PagedCache, kvs: Array, rows: Array) -> Array:
    """``bool[]``: whether ``i32[layers, batch, kv_heads]`` KVs, in all homes, are no more than ``held`` reads of the
    rows, ``bool[batch]``. Blocks alone would allow more: of the low tier, and quantised beside unquantised."""
    return jnp.all((kvs <= cache.capacity) | ~rows[None, :, None])


def held(cache: PagedCache) -> Held:
    """Reads scores and positions of all that a cache holds."""
    quantised = cache.quantised
    place = jnp.arange(cache.capacity)
    high, low = quantised.lengths[..., HIGH, None], quantised.lengths[..., LOW, None]
    end = high + low + cache.lengths[..., None]
    home = jnp.where(place < high, HIGH, jnp.where(place < high + low, LOW, jnp.where(place < end, RAW, GONE)))
    index = place - jnp.where(home == HIGH, 0, jnp.where(home == LOW, high, high + low))
    raw = jnp.clip(place - high - low, 0, cache.capacity - 1)
    table = cache.block_table, cache.lengths
    scores, positions = (
        jnp.take_along_axis(in_table_order(values, *table, cache.block_size), raw, axis=-1)
        for values in (cache.scores, cache.positions)
    )

    def read_tiers(values: tuple[Array, Array]) -> tuple[Array, Array]:
        scores, positions = values
        for tier, segments in enumerate(quantised.layout.tiers):
            words = blocks.read_words(quantised.pool, _table(quantised, tier), segments.scores, segments.end)
            score, position = (part.reshape(*index.shape[:-1], -1) for part in jnp.split(words, 2, axis=-1))
            place = jnp.minimum(index, score.shape[-1] - 1)
            score, position = (jnp.take_along_axis(part, place, axis=-1) for part in (score, position))
            scores = jnp.where(home == tier, lax.bitcast_convert_type(score, jnp.float32), scores)
            positions = jnp.where(home == tier, lax.bitcast_convert_type(position, jnp.int32), positions)
        return scores, positions

    scores, positions = lax.cond(jnp.any(quantised.lengths > 0), read_tiers, lambda values: values, (scores, positions))
    return Held(
        home=home,
        index=index,
        scores=scores,
        positions=positions,
        num_tokens=cache.num_tokens,
        whole=cache.num_tokens,
        table_bytes=(cache.block_table.nbytes + cache.lengths.nbytes) // cache.num_tokens.shape[0] + 8,
        block_size=cache.block_size,
        block_bytes=cache.block_bytes,
    )


def move(cache: PagedCache, now: Held, goal: Array, worth: Array, *, keep_unquantised: bool = False) -> PagedCache:
    """Moves each KV of a cache of one sequence to where ``goal`` says.

    Args:
      cache: donated; enough blocks must be free (``fits``).
      now: what it holds.
      goal: ``i32`` like ``now.home``: ``HIGH``, ``LOW`` or ``GONE``, only downwards; or, with
        ``keep_unquantised``, ``RAW`` for what stays that.
      worth: ``f32`` of the same shape: what each KV is worth to the next decode step, infinite where it must stay.
    """
    layers = goal.shape[0]
    count = jnp.stack([jnp.sum(goal == home, axis=-1, dtype=jnp.int32) for home in (HIGH, LOW)], axis=-1)
    first = jnp.cumsum(count, axis=-1) - count
    order = _order(goal, first)

    # The unquantised pool is carried, though it stays as it is: a constant of the loop would be copied before
    # ``_keep_unquantised`` writes it.
    def one_layer(layer: Array, pools: tuple[Tiers, Array]) -> tuple[Tiers, Array]:
        quantised, pool = pools
        key, value = (part[0] for part in read_layer(replace(cache, tiers=quantised, pool=pool), now, layer))
        kvs_of = blocks.Tokens(key, value, now.scores[layer, 0], now.positions[layer, 0])
        this = (jnp.arange(layers) == layer)[:, None, None]
        quantised = tiers.release(quantised, this)
        most = quantised.block_table.shape[-1]
        lengths = jnp.where(this[..., None], count, quantised.lengths)
        quantised, _ = tiers.grow(quantised, lengths, most=most)
        for tier in (HIGH, LOW):
            table, start = _table(quantised, tier)[layer, 0], first[layer, 0, :, tier]
            quantised = _fill(quantised, tier, table, count[layer, 0, :, tier], kvs_of, order[layer, 0], start)
        return quantised, lax.optimization_barrier(pool)

    quantised, pool = lax.fori_loop(0, layers, one_layer, (cache.quantised, cache.pool))
    cache = replace(cache, pool=pool)
    cache = _keep_unquantised(cache, now, goal == RAW) if keep_unquantised else allocator.release_unquantised(cache)
    quantised = replace(quantised, weakest=_weakest(goal, worth))
    return replace(cache, tiers=quantised)


def _keep_unquantised(cache: PagedCache, now: Held, kept: Array) -> PagedCache:
    """Drops all unquantised KVs but those, ``bool`` like ``now.home``, which move together."""
    before = jnp.sum((now.home == HIGH) | (now.home == LOW), axis=-1, keepdims=True)
    index = jnp.arange(kept.shape[-1])
    kept = jnp.take_along_axis(kept, jnp.minimum(index + before, kept.shape[-1] - 1), axis=-1)
    kept &= index < cache.lengths[..., None]
    lengths = kept.sum(-1, dtype=jnp.int32)
    given = cache.blocks_held() - num_blocks(lengths, cache.block_size)
    return carry_out(cache, Plan(evicted=~kept, lengths=lengths, blocks=given))


def read_layer(cache: PagedCache, now: Held, layer: int | Array) -> tuple[Array, Array]:
    """K and V of a layer, ``f32[batch, kv_heads, kvs, head_dim]``, in the order of ``now``."""
    quantised = cache.quantised
    head_dim, half = quantised.layout.head_dim, cache.pool.shape[2] // 2
    home, index = now.home[layer], now.index[layer]
    unquantised = jnp.where(home == RAW, index, 0)
    block = jnp.take_along_axis(cache.block_table[layer], unquantised // cache.block_size, axis=-1)
    rows = read_rows(cache.pool[jnp.where(home == RAW, block, 0), unquantised % cache.block_size])

    def read_tiers(kv: tuple[Array, Array]) -> tuple[Array, Array]:
        key, value = kv
        for tier, segments in enumerate(quantised.layout.tiers):
            words = blocks.read_words(quantised.pool, _table(quantised, tier)[layer], 0, segments.end)
            read = blocks.decode(words, segments, head_dim)
            here = (home == tier)[..., None]
            key = jnp.where(here, _at(read.key, index), key)
            value = jnp.where(here, _at(read.value, index), value)
        return key, value

    kv = rows[..., :head_dim], rows[..., half : half + head_dim]
    return lax.cond(jnp.any(quantised.lengths > 0), read_tiers, lambda kv: kv, kv)


def unquantised_layer(cache: PagedCache, now: Held, layer: int | Array) -> RawKVs:
    """A layer's KVs dequantised, in a pool of their own, which attention kernels can read."""
    kv = read_layer(cache, now, layer)
    batch, kv_heads, _, head_dim = kv[0].shape
    half = cache.pool.shape[2] // 2
    pad = ((0, 0),) * 3 + ((0, half - head_dim),)
    rows = to_rows(jnp.concatenate([jnp.pad(part, pad) for part in kv], axis=-1), cache.pool.dtype)
    pool = rows.reshape(-1, cache.block_size, 2 * half)
    table = jnp.arange(pool.shape[0], dtype=jnp.int32).reshape(batch, kv_heads, -1)
    return RawKVs(pool, table, now.lengths[layer])


def put_scores(cache: PagedCache, scores: Array, positions: Array) -> PagedCache:
    """New scores for every KV, and new positions for the quantised ones.

    Args:
      cache: donated.
      scores: ``f32[layers, batch, kv_heads, kvs]`` in the order of ``held``.
      positions: ``i32`` of the same shape.
    """
    quantised = cache.quantised
    before = quantised.lengths.sum(-1, keepdims=True)
    raw = jnp.minimum(jnp.arange(cache.capacity) + before, cache.capacity - 1)
    unquantised = jnp.take_along_axis(scores, raw, axis=-1)
    cache = replace(cache, scores=to_slots(cache.scores, cache.block_table, cache.lengths, unquantised))

    def put(pool: Array) -> Array:
        values = [lax.bitcast_convert_type(part, jnp.uint32) for part in (scores, positions)]
        for tier, segments in enumerate(quantised.layout.tiers):
            table = _table(quantised, tier)
            width = table.shape[-1]
            index = jnp.arange(width * segments.tokens) + quantised.lengths[..., HIGH, None] * tier
            index = jnp.minimum(index, cache.capacity - 1)
            new = [jnp.take_along_axis(part, index, axis=-1).reshape(*table.shape, -1) for part in values]
            real = jnp.arange(width) < quantised.blocks_held()[..., tier, None]
            at = jnp.where(real, table, pool.shape[0])
            pool = blocks.write_words(pool, at, segments.scores, jnp.concatenate(new, axis=-1))
        return pool

    pool = lax.cond(jnp.any(quantised.lengths > 0), put, lambda pool: pool, quantised.pool)
    return replace(cache, tiers=replace(quantised, pool=pool))


def fits(cache: PagedCache, goal: Array) -> Array:
    """``bool[]``: whether enough blocks are free for ``move``, which gives a layer's back before it takes its new."""
    quantised = cache.quantised
    count = jnp.stack([jnp.sum(goal == home, axis=-1, dtype=jnp.int32) for home in (HIGH, LOW)], axis=-1)
    more = tiers.num_blocks(count, quantised.tokens) - quantised.blocks_held()
    return jnp.max(jnp.cumsum(more.sum((1, 2, 3)))) <= quantised.free.count


def _table(quantised: Tiers, tier: int) -> Array:
    """The table with a tier's blocks from the left."""
    return quantised.block_table if tier == HIGH else quantised.block_table[..., ::-1]


def _at(vectors: Array, index: Array) -> Array:
    """Those at ``i32[..., kvs]`` of the vectors ``[..., blocks, tokens, head_dim]``, or any where there is none."""
    flat = vectors.reshape(*index.shape[:-1], -1, vectors.shape[-1])
    return jnp.take_along_axis(flat, jnp.minimum(index, flat.shape[-2] - 1)[..., None], axis=-2)


def _order(goal: Array, first: Array) -> Array:
    """``i32`` like goal: the KVs of each head that stay, in the order of their new homes."""
    kvs = goal.shape[-1]
    at = jnp.full(goal.shape, kvs)
    for home in (HIGH, LOW):
        here = goal == home
        at = jnp.where(here, first[..., home, None] + jnp.cumsum(here, axis=-1) - 1, at)
    flat = at.reshape(-1, kvs)
    row = jnp.arange(flat.shape[0])[:, None]
    source = jnp.broadcast_to(jnp.arange(kvs), flat.shape)
    return jnp.zeros(flat.shape, jnp.int32).at[row, flat].set(source, mode="drop").reshape(goal.shape)


def _fill(
    quantised: Tiers,
    tier: int,
    table: Array,
    lengths: Array,
    source: blocks.Tokens,
    order: Array,
    start: Array,
) -> Tiers:
    """Writes a layer's KVs of a tier into its blocks, ``i32[kv_heads, max_blocks]`` from the left, some at a time."""
    segments = quantised.layout.tiers[tier]
    blocks_of = walk(table, lengths, segments.tokens)

    def step(i: Array, pool: Array) -> Array:
        part = blocks_of.part(i)
        place = jnp.minimum(start[part.row][:, None] + part.places, order.shape[-1] - 1)
        kv = order[part.row[:, None], place]

        def take(values: Array) -> Array:
            taken = values[part.row[:, None], kv]
            return jnp.where(part.held.reshape(part.held.shape + (1,) * (taken.ndim - 2)), taken, 0)

        new = blocks.encode(blocks.Tokens(*(take(values) for values in source)), segments, quantised.layout.words)
        return pool.at[part.blocks].set(new.reshape(-1, *pool.shape[1:]), mode="promise_in_bounds")

    return replace(quantised, pool=lax.fori_loop(0, blocks_of.steps, step, quantised.pool))


def _weakest(goal: Array, worth: Array) -> Weakest:
    values, indices = [], []
    for tier in (HIGH, LOW):
        here = goal == tier
        value = jnp.where(here, worth, jnp.inf)
        rank = jnp.cumsum(here, axis=-1) - 1
        least = jnp.argmin(value, axis=-1)[..., None]
        values.append(jnp.take_along_axis(value, least, axis=-1)[..., 0])
        indices.append(jnp.take_along_axis(rank, least, axis=-1)[..., 0])
    return Weakest(value=jnp.stack(values, -1), index=jnp.maximum(jnp.stack(indices, -1), 0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an eviction does to each head."""

    evicted: Array
    """``bool[layers, batch, kv_heads, kvs]`` in table order."""
    lengths: Array
    """``i32[layers, batch, kv_heads]`` afterwards."""
    blocks: Array
    """``i32[layers, batch, kv_heads]`` blocks given up."""


def plan_moves(plan: Plan, lengths: Array) -> Moves:
    """Survivors past the new end go into the holes before it: as many of the one as of the other in each head."""
    kvs = plan.evicted.shape[-1]
    index = jnp.arange(kvs)
    tail = (index >= plan.lengths[..., None]) & (index < lengths[..., None])
    return Moves(
        is_source=(tail & ~plan.evicted).reshape(-1, kvs),
        is_hole=(plan.evicted & (index < plan.lengths[..., None])).reshape(-1, kvs),
    )


def carry_out(cache: PagedCache, plan: Plan) -> PagedCache:
    """Moves the survivors together and returns the freed blocks to the pool."""
    table = cache.block_table.reshape(-1, cache.block_table.shape[-1])
    moves = plan_moves(plan, cache.lengths)
    pool, kept_scores, positions = move_kvs(cache.pool, cache.scores, cache.positions, table, moves)
    cache = replace(cache, pool=pool, scores=kept_scores, positions=positions)
    return allocator.release(cache, plan.lengths)
