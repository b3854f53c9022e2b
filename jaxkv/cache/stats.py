"""What a cache holds, read back to the host."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from jaxkv.cache.state import PagedCache


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """What a cache holds. All bytes are of memory that is really held; what a prefix lends counts for each borrower."""

    bytes_allocated: int
    """All arrays of the cache: pools, scores, positions, tables, lengths, free lists."""
    bytes_held: int
    """Blocks held, quantised or not, with their scores and positions, and the tables."""
    bytes_full: int
    """The same if nothing had been evicted or quantised."""
    bytes_full_16bit: int
    """K and V alone of everything, at 16 bits a value, whatever the cache's dtype."""
    kvs_held: int
    kvs_high: int
    """Those of ``kvs_held`` that are quantised, in the high tier."""
    kvs_low: int
    kvs_full: int
    blocks_held: int
    """Quantised or not."""
    blocks_full: int
    blocks_free: int
    """Unquantised ones."""
    block_size: int
    blocks_per_head: np.ndarray
    """``i32[layers, kv_heads]``, summed over the batch."""
    fragmentation: float
    """Share of the held slots that no KV fills."""
    nominal_share: float
    """Bits of K and V held over those of the full cache at 16 bits, as papers count: no scales, scores or slack."""


def stats(cache: PagedCache) -> CacheStats:
    """Reads the cache's sizes back to the host."""
    lengths, tokens, free = jax.device_get((cache.lengths, cache.num_tokens, cache.num_free))
    layers, _, kv_heads = lengths.shape
    size = cache.block_size
    blocks = -(-lengths // size)
    slots, kvs = int(blocks.sum()) * size, int(lengths.sum())
    blocks_full = int((-(-tokens // size)).sum()) * layers * kv_heads
    kvs_full = int(tokens.sum()) * layers * kv_heads
    table_bytes = sum(a.nbytes for a in (cache.block_table, cache.lengths, cache.num_tokens, cache.shared))
    held = int(blocks.sum()) * cache.block_bytes + table_bytes
    high = low = 0
    bits = 32 * kvs
    if cache.tiers is not None:
        layout, counts = cache.tiers.layout, jax.device_get(cache.tiers.lengths)
        quantised = -(-counts // cache.tiers.tokens)
        blocks = blocks + quantised.sum(-1)
        held += int(quantised.sum()) * layout.block_bytes + counts.shape[1] * cache.tiers.row_bytes
        high, low = (int(n) for n in counts.sum((0, 1, 2)))
        slots += int((quantised * cache.tiers.tokens).sum())
        bits += high * layout.high.bits + low * layout.low.bits
    return CacheStats(
        bytes_allocated=sum(leaf.nbytes for leaf in jax.tree.leaves(cache)),
        bytes_held=held,
        bytes_full=blocks_full * cache.block_bytes + table_bytes,
        bytes_full_16bit=2 * kvs_full * 2 * cache.head_dim,
        kvs_held=kvs + high + low,
        kvs_high=high,
        kvs_low=low,
        kvs_full=kvs_full,
        blocks_held=int(blocks.sum()),
        blocks_full=blocks_full,
        blocks_free=int(free),
        block_size=size,
        blocks_per_head=blocks.sum(1),
        fragmentation=1 - (kvs + high + low) / slots if slots else 0.0,
        nominal_share=bits / (32 * kvs_full) if kvs_full else 0.0,
    )
