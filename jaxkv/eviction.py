"""The one mechanism of eviction: scores -> whole blocks to give up -> moves -> release. It knows no policy.

KV-Compress (arXiv 2410.00161), section 4: a block is freed only when the worst KVs of its head fill one, so each head
offers its blocks at the price of the best KV that must go with them, and the cheapest blocks of all layers and heads
of a sequence are taken; or of each group of heads, where the budget is shared otherwise (``jaxkv.shares``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkv import allocator
from jaxkv.cache import PagedCache, num_blocks
from pallas_kernels.block_moves import Moves, move_kvs

if TYPE_CHECKING:
    from jaxkv.shares import Shares

KEPT = jnp.iinfo(jnp.int32).max
"""Sort key of what can't be evicted; above that of any score, +inf included."""


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


def sort_keys(scores: Array) -> Array:
    """Integers in the order of the floats: they sort several times faster on CPU, and -0.0 and NaN have a place."""
    scores = jnp.where(scores == 0, 0.0, scores.astype(jnp.float32))  # XLA takes x + 0.0 for x, which -0.0 is not
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def plan_eviction(
    scores: Array,
    evictable: Array,
    lengths: Array,
    evict_blocks: Array,
    *,
    block_size: int,
    floor: int = 1,
    shares: Shares | None = None,
) -> Plan:
    """Chooses which KVs go, so that each sequence gives up exactly ``evict_blocks`` blocks where that is feasible.

    A head's first block costs as many KVs as its last block holds (``hang``), each further one ``block_size``. Row
    ``j`` of a head has the price of the dearest KV among its ``j * block_size + hang`` worst. Equal prices go by layer,
    then head, then row, and equal scores by table order, so the outcome is deterministic.

    Args:
      scores: ``f32[layers, batch, kv_heads, kvs]``, in table order; the lowest go first.
      evictable: ``bool`` of the same shape; False also past a head's length.
      lengths: ``i32[layers, batch, kv_heads]``.
      evict_blocks: ``i32[batch]``; more than is feasible gives up as many as are.
      block_size: KVs a block.
      floor: blocks that a head always keeps.
      shares: how the heads share what stays; None: all heads of a sequence compete.
    """
    keys = jnp.where(evictable, sort_keys(scores), KEPT)
    blocks = num_blocks(lengths, block_size)
    hang = lengths - (blocks - 1) * block_size
    kvs = keys.shape[-1]

    ascending = jnp.sort(keys, axis=-1)
    row = jnp.arange(kvs // block_size)
    last = row * block_size + hang[..., None] - 1
    price = jnp.take_along_axis(ascending, jnp.clip(last, 0, kvs - 1), axis=-1)
    price = jnp.where(row < blocks[..., None] - floor, price, KEPT)  # [layers, batch, kv_heads, rows]

    price = jnp.moveaxis(price, 1, 0)  # [batch, layers, kv_heads, rows]: the order of ties
    groups = evict_blocks[:, None]
    if shares is not None:
        held = jnp.moveaxis(blocks, 1, 0)
        keep = shares.keep(held, price < KEPT, evict_blocks)  # [batch, groups]
        heads = held.reshape(*keep.shape, -1)
        groups = heads.sum(-1) - keep
        least = (shares.floor / heads.shape[-1] * keep).astype(jnp.int32)[..., None]
        price = jnp.where(row < (heads - least)[..., None], price.reshape(*heads.shape, -1), KEPT).reshape(price.shape)
    taken = take_cheapest(price.reshape(groups.size, -1), groups.reshape(-1))
    given = jnp.moveaxis(taken.reshape(price.shape).sum(-1, dtype=jnp.int32), 0, 1)

    count = jnp.where(given > 0, (given - 1) * block_size + hang, 0)
    shape = keys.shape
    evicted = take_cheapest(keys.reshape(-1, kvs), count.reshape(-1), ascending.reshape(-1, kvs)).reshape(shape)
    return Plan(evicted=evicted, lengths=lengths - count, blocks=given)


def take_cheapest(keys: Array, count: Array, ascending: Array | None = None) -> Array:
    """Marks the ``count`` lowest keys of each row that are below ``KEPT``, ties by index: ``bool`` like ``keys``."""
    if ascending is None:
        ascending = jnp.sort(keys, axis=-1)
    bound = jnp.take_along_axis(ascending, jnp.clip(count - 1, 0, keys.shape[-1] - 1)[:, None], axis=-1)
    below = keys < bound
    level = keys == bound
    room = count - below.sum(-1, dtype=jnp.int32)
    level = level & (jnp.cumsum(level, axis=-1) <= room[:, None])
    return (below | level) & (keys < KEPT) & (count > 0)[:, None]


def plan_moves(plan: Plan, lengths: Array) -> Moves:
    """Survivors past the new end go into the holes before it: as many of the one as of the other in each head."""
    kvs = plan.evicted.shape[-1]
    index = jnp.arange(kvs)
    tail = (index >= plan.lengths[..., None]) & (index < lengths[..., None])
    return Moves(
        is_source=(tail & ~plan.evicted).reshape(-1, kvs),
        is_hole=(plan.evicted & (index < plan.lengths[..., None])).reshape(-1, kvs),
    )


def evict(
    cache: PagedCache,
    scores: Array,
    evictable: Array,
    evict_blocks: Array,
    *,
    floor: int = 1,
    shares: Shares | None = None,
) -> PagedCache:
    """Gives up blocks of each sequence, moves the survivors together and returns the freed blocks to the pool.

    Arguments as for ``plan_eviction``.
    """
    size = cache.block_size
    plan = plan_eviction(scores, evictable, cache.lengths, evict_blocks, block_size=size, floor=floor, shares=shares)
    return carry_out(cache, plan)


def carry_out(cache: PagedCache, plan: Plan) -> PagedCache:
    """Moves the survivors together and returns the freed blocks to the pool."""
    table = cache.block_table.reshape(-1, cache.block_table.shape[-1])
    moves = plan_moves(plan, cache.lengths)
    pool, kept_scores, positions = move_kvs(cache.pool, cache.scores, cache.positions, table, moves)
    cache = replace(cache, pool=pool, scores=kept_scores, positions=positions)
    return allocator.release(cache, plan.lengths)
