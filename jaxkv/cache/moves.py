"""Moving the KVs of a sequence to where a goal says: the one mechanism of compression, whatever decides.

Unquantised survivors move into the holes before their head's new end, and the blocks past it are free again. Where
quantised KVs are concerned it goes layer by layer: a layer's KVs are read out, its quantised blocks go back to the free
list, and the KVs are written into blocks allocated anew. Reading a quantised KV and quantising it again at the same
width gives the same codes, so what stays in its tier is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.contents import Contents, of_raw, read_layer
from jaxkv.cache.home import HIGH, LOW, RAW
from jaxkv.cache.quantised import NoStore, QuantisedStore
from jaxkv.cache.state import PagedCache
from pallas_kernels.block_moves import Moves, move_kvs
from pallas_kernels.paged_attention import Weakest
from pallas_kernels.quantised_block import blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Goal:
    """Where the KVs of one sequence shall live; arrays are in the order of its ``Contents``."""

    home: Array
    """``i32``, of ``Home``. What is quantised is never brought back."""
    positions: Array
    """``i32``: what to store as a quantised KV's position."""
    worth: Array | None = None
    """``f32``: what each KV is worth to the next decode step, infinite where it must stay; None: nothing asks."""
    raw_stays: bool = field(default=True, metadata={"static": True})
    """Whether any KV may stay unquantised."""


def move(cache: PagedCache, now: Contents, goal: Goal) -> PagedCache:
    """Moves each KV of a cache of one sequence to where the goal says.

    Where too few quantised blocks are free for it nothing changes.

    Args:
      cache: donated.
      now: what it holds.
      goal: see ``Goal``.
    """
    if isinstance(cache.quantised, NoStore):
        return _keep_raw(cache, goal.home == RAW)
    count = jnp.stack([jnp.sum(goal.home == home, axis=-1, dtype=jnp.int32) for home in (HIGH, LOW)], axis=-1)
    now = replace(now, positions=goal.positions)

    def act(cache: PagedCache) -> PagedCache:
        before = cache
        cache = _requantise(cache, now, goal, count)
        if goal.raw_stays:
            return _keep_raw(cache, of_raw(before, goal.home == RAW))
        return cache.with_raw_lengths(jnp.zeros_like(cache.raw.lengths))

    return lax.cond(cache.quantised.fits(count), act, lambda cache: cache, cache)


def _requantise(cache: PagedCache, now: Contents, goal: Goal, count: Array) -> PagedCache:
    """Gives the quantised store what the goal has for it; ``count`` is ``i32[layers, 1, kv_heads, 2]``."""
    first = jnp.cumsum(count, axis=-1, dtype=jnp.int32) - count
    order = _order(goal.home, first)

    # The unquantised pool is carried, though it stays as it is: a constant of the loop would be copied before
    # ``_keep_raw`` writes it.
    def one_layer(layer: Array, stores: tuple[QuantisedStore, Array]) -> tuple[QuantisedStore, Array]:
        quantised, pool = stores
        here = replace(cache, quantised=quantised, raw=replace(cache.raw, pool=pool))
        key, value = (part[0] for part in read_layer(here, now, layer))
        kvs = blocks.Tokens(key, value, now.scores[layer, 0], now.positions[layer, 0])
        return quantised.refill_layer(layer, kvs, count, first, order), lax.optimization_barrier(pool)

    layers = goal.home.shape[0]
    quantised, pool = lax.fori_loop(0, layers, one_layer, (cache.tiers, cache.raw.pool))
    if goal.worth is not None:
        quantised = replace(quantised, weakest=_weakest(goal.home, goal.worth))
    return replace(cache, raw=replace(cache.raw, pool=pool), quantised=quantised)


def _order(home: Array, first: Array) -> Array:
    """``i32`` like home: the KVs of each head that are quantised, in the order of their new homes."""
    kvs = home.shape[-1]
    at = jnp.full(home.shape, kvs, jnp.int32)
    for tier in (HIGH, LOW):
        here = home == tier
        at = jnp.where(here, first[..., tier, None] + jnp.cumsum(here, axis=-1, dtype=jnp.int32) - 1, at)
    flat = at.reshape(-1, kvs)
    row = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    source = jnp.broadcast_to(jnp.arange(kvs, dtype=jnp.int32), flat.shape)
    return jnp.zeros(flat.shape, jnp.int32).at[row, flat].set(source, mode="drop").reshape(home.shape)


def _weakest(home: Array, worth: Array) -> Weakest:
    values, indices = [], []
    for tier in (HIGH, LOW):
        here = home == tier
        value = jnp.where(here, worth, jnp.inf)
        rank = jnp.cumsum(here, axis=-1, dtype=jnp.int32) - 1
        least = jnp.argmin(value, axis=-1)[..., None]
        values.append(jnp.take_along_axis(value, least, axis=-1)[..., 0])
        indices.append(jnp.take_along_axis(rank, least, axis=-1)[..., 0])
    return Weakest(value=jnp.stack(values, -1), index=jnp.maximum(jnp.stack(indices, -1), 0))


def _keep_raw(cache: PagedCache, kept: Array) -> PagedCache:
    """Drops all unquantised KVs but those, ``bool[layers, batch, kv_heads, capacity]`` in table order: survivors past
    the new end go into the holes before it, as many of the one as of the other in each head."""
    raw = cache.raw
    kept &= jnp.arange(kept.shape[-1], dtype=jnp.int32) < raw.lengths[..., None]
    lengths, moves = moves_of(kept)
    table = raw.tables.block_table.reshape(-1, raw.tables.max_blocks)
    pool, scores, positions = move_kvs(raw.pool, raw.scores, raw.positions, table, moves)
    raw = replace(raw, pool=pool, scores=scores, positions=positions)
    return replace(cache, raw=raw).with_raw_lengths(lengths)


def moves_of(kept: Array) -> tuple[Array, Moves]:
    """How many KVs each head keeps, and the moves that close its holes; ``kept`` as for ``_keep_raw``."""
    kvs = kept.shape[-1]
    lengths = kept.sum(-1, dtype=jnp.int32)
    before_end = jnp.arange(kvs, dtype=jnp.int32) < lengths[..., None]
    moves = Moves(is_source=(kept & ~before_end).reshape(-1, kvs), is_hole=(~kept & before_end).reshape(-1, kvs))
    return lengths, moves
