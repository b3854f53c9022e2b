"""Blocks handed out and taken back for all heads at once, by ranks: no serial loop, no host."""

from dataclasses import replace

import jax.numpy as jnp
from jax import Array

from jaxkv.cache import quantised as tiers
from jaxkv.cache.state import PagedCache, num_blocks


def has_room(cache: PagedCache, lengths: Array) -> Array:
    """``bool[]``: whether ``grow`` can give the heads ``lengths`` KVs, ``i32[layers, batch, kv_heads]``."""
    need = num_blocks(lengths, cache.block_size) - cache.blocks_held()
    return (jnp.sum(need) <= cache.num_free) & jnp.all(lengths <= cache.capacity)


def grow(cache: PagedCache, lengths: Array, *, most: int) -> tuple[PagedCache, Array]:
    """Gives each head the blocks for ``lengths`` KVs, all heads or none.

    Args:
      cache: the cache.
      lengths: ``i32[layers, batch, kv_heads]``, none shorter than the head's present length.
      most: bound on the KVs that a head grows by; static.

    Returns:
      The cache with the new blocks and lengths and ``bool[]`` granted. Where the pool has too few free blocks, or a
      table row is too short, nothing changes and granted is False.
    """
    size = cache.block_size
    have = cache.blocks_held()
    need = num_blocks(lengths, size) - have
    granted = has_room(cache, lengths)
    place = jnp.arange(-(-most // size))
    wanted = granted & (place < need[..., None])
    cache, block = take(cache, wanted)
    column = jnp.where(wanted, have[..., None] + place, cache.block_table.shape[-1])
    layer, sequence, head, _ = jnp.ogrid[tuple(slice(n) for n in (*have.shape, 1))]
    table = cache.block_table.at[layer, sequence, head, column].set(block, mode="drop")
    return replace(cache, block_table=table, lengths=jnp.where(granted, lengths, cache.lengths)), granted


def take(cache: PagedCache, wanted: Array) -> tuple[PagedCache, Array]:
    """Takes a free block for each place that is wanted, ``bool[...]``: the blocks, ``i32`` of the same shape."""
    rank = jnp.cumsum(wanted).reshape(wanted.shape)
    blocks = cache.free_blocks[jnp.where(wanted, cache.num_free - rank, 0)]
    return replace(cache, num_free=cache.num_free - jnp.sum(wanted)), blocks


def give_back(cache: PagedCache, blocks: Array, freed: Array) -> PagedCache:
    """Frees the blocks, ``i32[...]``, where ``bool[...]`` freed."""
    rank = jnp.cumsum(freed)
    at = jnp.where(freed.reshape(-1), cache.num_free + rank - 1, cache.free_blocks.shape[0])
    return replace(
        cache,
        free_blocks=cache.free_blocks.at[at].set(blocks.reshape(-1), mode="drop"),
        num_free=cache.num_free + rank[-1],
    )


def release(cache: PagedCache, lengths: Array) -> PagedCache:
    """Cuts each head to ``lengths`` KVs, ``i32[layers, batch, kv_heads]``; blocks past them go back to the pool.

    But for those that belong to a prefix.
    """
    have = cache.blocks_held()
    keep = jnp.maximum(num_blocks(lengths, cache.block_size), cache.shared[:, None])
    place = jnp.arange(cache.block_table.shape[-1])
    freed = (place >= keep[..., None]) & (place < have[..., None])
    return replace(give_back(cache, cache.block_table, freed), lengths=lengths)


def release_unquantised(cache: PagedCache) -> PagedCache:
    """Takes back all blocks of the pool; what is quantised stays."""
    return replace(release(cache, jnp.zeros_like(cache.lengths)), shared=jnp.zeros_like(cache.shared))


def release_sequences(cache: PagedCache, finished: Array) -> PagedCache:
    """Empties the rows of the batch where ``finished``, ``bool[batch]``, and takes their blocks back."""
    cache = release(cache, jnp.where(finished[:, None], 0, cache.lengths))
    return replace(
        cache,
        tiers=None if cache.tiers is None else tiers.release(cache.tiers, finished[:, None]),
        num_tokens=jnp.where(finished, 0, cache.num_tokens),
        shared=jnp.where(finished, 0, cache.shared),
    )
