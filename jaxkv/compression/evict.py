"""The one mechanism of eviction: scores -> whole blocks to give up -> moves -> release. It knows no policy.

KV-Compress (arXiv 2410.00161), section 4: a block is freed only when the worst KVs of its head fill one, so each head
offers its blocks at the price of the best KV that must go with them, and the cheapest blocks of all layers and heads
of a sequence are taken; or of each group of heads, where the budget is shared otherwise (``jaxkv.compression.shares``).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxkv.cache.moves import Plan, carry_out
from jaxkv.cache.state import PagedCache, num_blocks
from jaxkv.compression.ranking import KEPT, sort_keys, take_cheapest
from jaxkv.compression.shares import Shares


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
