"""Heads with KVs in both tiers, and in unquantised blocks, at random places of pools full of garbage."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from oracles.tiers import Block, Tokens

from pallas_kernels.paged_attention import RawKVs, Significance
from pallas_kernels.quantised_block import BlockLayout, Format

WINDOW = 20
SIGNIFICANCE = Significance(
    observe=lambda p: p.max(-2),
    value=lambda scores, positions, following: jnp.where(
        following - positions >= WINDOW, scores / jnp.maximum(following - positions, 1).astype(jnp.float32), jnp.inf
    ),
)


def layout_of(high, low, *, head_dim=64, tokens=64, tile=8, low_step=1):
    high, low = Format.named(high), Format.named(low)
    return BlockLayout(head_dim=head_dim, high=high, low=low, tokens=tokens, tile=tile, low_step=low_step)


LAYOUTS = {
    "plain": layout_of("K8V4", "K4V2", tokens=32),
    "wide": layout_of("K8V4", "K4V2", head_dim=128, tokens=32),
    "groups": layout_of("K8V4/1,2", "K4V2/2,4", head_dim=128, tokens=32),
    "other way round": layout_of("K4V8", "K2V4/4,1", tokens=32),
    "one format": layout_of("K4V4", "K4V4", tokens=32),
}


class Held(NamedTuple):
    """The arguments of ``paged_attention`` over tiers, but for the query, and what is in them."""

    pool: np.ndarray
    """``u32[blocks, rows, 128]``."""
    table: np.ndarray
    lengths: np.ndarray
    """``i32[batch, kv_heads, 2]``."""
    tokens: dict
    """By batch, head and tier."""
    raw: RawKVs
    raw_kvs: dict
    following: np.ndarray


def block_of(pool, block, layout, tier):
    segments = layout.tiers[tier]
    return Block(pool.reshape(len(pool), -1)[block], segments.format, segments.tokens, layout.head_dim)


def slots(held, layout, where, tier):
    """Block and offset of each KV of a head's tier."""
    size = layout.tiers[tier].tokens
    row = held.table[where] if tier == 0 else held.table[where][::-1]
    return [(row[i // size], i % size) for i in range(held.lengths[(*where, tier)])]


def hold(rng, layout, lengths, *, dtype=np.float32, max_blocks=None):
    """``lengths``: ``[batch, kv_heads, 2]``. What no KV is in is garbage: random bits, NaN, and in tables any block."""
    sizes = np.array([tier.tokens for tier in layout.tiers])
    used = -(-lengths // sizes)
    max_blocks = max_blocks or int(used.sum(-1).max()) + 1
    heads = lengths.shape[:-1]
    blocks = 1 + max_blocks * heads[0] * heads[1]
    pool = rng.integers(0, 2**32, (blocks, layout.rows, 128), dtype=np.uint32)
    table = np.full((*heads, max_blocks), blocks + 10**6, np.int32)
    ids, tokens = list(1 + rng.permutation(blocks - 1)), {}
    for where in np.ndindex(heads):
        for tier in range(2):
            mine = np.array([ids.pop() for _ in range(used[(*where, tier)])], np.int32)
            row = table[where] if tier == 0 else table[where][::-1]
            row[: len(mine)] = mine
            n = lengths[(*where, tier)]
            kvs = Tokens(
                *(rng.standard_normal((n, layout.head_dim)).astype(np.float32) for _ in range(2)),
                rng.random(n).astype(np.float32),
                rng.integers(0, 100, n).astype(np.int32),
            )
            size = sizes[tier]
            for i, kv in enumerate(zip(*kvs, strict=True)):
                block_of(pool, mine[i // size], layout, tier).put(i % size, *kv)
            tokens[(*where, tier)] = kvs
    raw, raw_kvs = _raw(rng, heads, layout.head_dim, dtype)
    return Held(pool, table, lengths.astype(np.int32), tokens, raw, raw_kvs, rng.integers(100, 130, heads[0]))


def _raw(rng, heads, head_dim, dtype, size=16):
    lengths = rng.integers(0, 40, heads)
    lengths[0, 0] = 0
    pool = np.full((1 + 3 * lengths.size, size, 2 * head_dim), np.nan, np.float32)
    table = (1 + rng.permutation(3 * lengths.size)).reshape(*heads, 3).astype(np.int32)
    kvs = {}
    for where in np.ndindex(heads):
        kv = np.asarray(jnp.asarray(rng.standard_normal((lengths[where], 2 * head_dim)), dtype), np.float32)
        for i, row in enumerate(kv):
            pool[table[where][i // size], i % size] = row
        kvs[where] = kv[:, :head_dim], kv[:, head_dim:]
    return RawKVs(jnp.asarray(pool, dtype), jnp.asarray(table), jnp.asarray(lengths, jnp.int32)), kvs
