"""Whole blocks go, the cheapest first.

KV-Compress (arXiv 2410.00161), section 4: a block is freed only when the worst KVs of its head fill one, so each head
offers its blocks at the price of the best KV that must go with them, and the cheapest blocks of all layers and heads
of a sequence are taken; or of each group of heads, where the budget is shared otherwise (``compression.shares``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.contents import Contents
from jaxkv.cache.home import GONE, RAW
from jaxkv.cache.moves import Goal
from jaxkv.cache.shards import WHOLE, HeadShards
from jaxkv.cache.state import PagedCache
from jaxkv.compression.placement import Placement, Worth
from jaxkv.compression.ranking import KEPT, sort_keys, take_cheapest
from jaxkv.compression.shares import Global, Shares


@dataclass(frozen=True, kw_only=True)
class Evict(Placement):
    """What stays is unquantised. A head that gives something up ends with whole blocks."""

    shares: Shares = Global()
    """How the heads of a sequence share the budget."""

    def due(self, cache: PagedCache, room: Array) -> Array:
        return self._surplus(cache, room) > 0

    def goal(self, cache: PagedCache, now: Contents, worth: Worth, room: Array) -> Goal:
        # XLA for TPU takes minutes to compile what it would fuse across this line; on CPU the barrier is nothing.
        rank, evictable = lax.optimization_barrier((worth.rank, now.held & ~worth.protected))
        plan = plan_eviction(
            rank,
            evictable,
            cache.raw.lengths,
            self._surplus(cache, room)[None],
            block_size=cache.raw.block_size,
            shares=self.shares,
            shards=cache.shards,
        )
        home = jnp.where(now.held & ~plan.evicted, RAW, GONE)
        return Goal(home=home, positions=now.positions)

    def _surplus(self, cache: PagedCache, room: Array) -> Array:
        """``i32[]``: blocks beyond the room."""
        return jnp.maximum(cache.shards.sum(cache.raw.tables.blocks_held().sum(dtype=jnp.int32)) - room, 0)


class Plan(NamedTuple):
    """What an eviction does to each head."""

    evicted: Array
    """``bool[layers, batch, kv_heads, kvs]`` in table order."""
    lengths: Array
    """``i32[layers, batch, kv_heads]`` afterwards."""
    blocks: Array
    """``i32[layers, batch, kv_heads]`` blocks given up."""


def plan_eviction(
    scores: Array,
    evictable: Array,
    lengths: Array,
    evict_blocks: Array,
    *,
    block_size: int,
    floor: int = 1,
    shares: Shares | None = None,
    shards: HeadShards = WHOLE,
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
      shards: how the heads are split over devices: those of other arguments are one's own, ranked among all.
    """
    keys = jnp.where(evictable, sort_keys(scores), KEPT)
    blocks = -(-lengths // block_size)
    hang = lengths - (blocks - 1) * block_size
    kvs = keys.shape[-1]

    ascending = jnp.sort(keys, axis=-1)
    row = jnp.arange(kvs // block_size, dtype=jnp.int32)
    last = row * block_size + hang[..., None] - 1
    price = jnp.take_along_axis(ascending, jnp.clip(last, 0, kvs - 1), axis=-1)
    price = jnp.where(row < blocks[..., None] - floor, price, KEPT)  # [layers, batch, kv_heads, rows]

    price = jnp.moveaxis(shards.gather(price, 2), 1, 0)  # [batch, layers, kv_heads, rows]: the order of ties
    groups = evict_blocks[:, None]
    if shares is not None:
        held = jnp.moveaxis(shards.gather(blocks, 2), 1, 0)
        keep = shares.keep(held, price < KEPT, evict_blocks)  # [batch, groups]
        heads = held.reshape(*keep.shape, -1)
        groups = heads.sum(-1, dtype=jnp.int32) - keep
        least = (shares.floor / heads.shape[-1] * keep.astype(jnp.float32)).astype(jnp.int32)[..., None]
        price = jnp.where(row < (heads - least)[..., None], price.reshape(*heads.shape, -1), KEPT).reshape(price.shape)
    taken = take_cheapest(price.reshape(groups.size, -1), groups.reshape(-1))
    given = shards.own(jnp.moveaxis(taken.reshape(price.shape).sum(-1, dtype=jnp.int32), 0, 1), 2)

    count = jnp.where(given > 0, (given - 1) * block_size + hang, 0)
    shape = keys.shape
    evicted = take_cheapest(keys.reshape(-1, kvs), count.reshape(-1), ascending.reshape(-1, kvs)).reshape(shape)
    return Plan(evicted=evicted, lengths=lengths - count, blocks=given)
