"""Chunk attention in plain XLA: the oracle of the kernels' tests, and the path on CPU.

Cached keys are taken a tile at a time by a loop whose bound is data, the chunk's own keys in query blocks that see
only the keys before their end; nothing of size length x context exists. Softmax results are merged by their running
maximum and sum.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.kvs import RawKVs
from pallas_kernels.online_softmax import MASKED, Softmax, merge
from pallas_kernels.pool_values import IN_BOUNDS, read_rows
from pallas_kernels.prefill_attention.types import ObservedQueries

TILE_KVS = 512
QUERY_BLOCK = 256


def attend(query: Array, key: Array, value: Array, visible: Array) -> Softmax:
    """Scaled query ``[b, h, g, q, d]``, key and value ``[b, h, k, d]``, visible broadcasts to ``[b, h, g, q, k]``."""
    s = jnp.where(visible, logits(query, key), MASKED)
    maximum = s.max(-1)
    p = jnp.where(visible, jnp.exp(s - maximum[..., None]), 0.0)
    b, h, g, q, k = p.shape
    output = jnp.einsum("bhmk,bhkd->bhmd", p.reshape(b, h, g * q, k), value).reshape(b, h, g, q, -1)
    return Softmax(maximum, p.sum(-1), output)


def logits(query: Array, key: Array) -> Array:
    b, h, g, q, d = query.shape
    return jnp.einsum("bhmd,bhkd->bhmk", query.reshape(b, h, g * q, d), key).reshape(b, h, g, q, -1)


class Tiles(NamedTuple):
    """The cached KVs, cut into tiles of as many blocks of each head."""

    raw: RawKVs
    """Its table filled up to whole tiles."""
    max_blocks: int
    """Of the table as it was given."""
    blocks: int

    @classmethod
    def of(cls, raw: RawKVs) -> Tiles:
        max_blocks = raw.block_table.shape[2]
        blocks = min(max(1, TILE_KVS // raw.pool.shape[1]), max_blocks)
        table = jnp.pad(raw.block_table, ((0, 0), (0, 0), (0, -max_blocks % blocks)))
        return cls(raw._replace(block_table=table), max_blocks, blocks)

    @property
    def kvs(self) -> int:
        return self.blocks * self.raw.pool.shape[1]

    @property
    def resident(self) -> Array:
        """Tiles of the longest head."""
        return -(-jnp.max(self.raw.lengths) // self.kvs)

    def read(self, i: Array) -> tuple[Array, Array]:
        """K beside V ``[b, h, tile, 2 * half]`` of tile ``i`` and which of its slots hold a KV ``[b, h, tile]``."""
        pool, table, lengths = self.raw
        held = i * self.kvs + jnp.arange(self.kvs, dtype=jnp.int32) < lengths[..., None]
        blocks = lax.dynamic_slice_in_dim(table, i * self.blocks, self.blocks, axis=2)
        blocks = jnp.where(held[..., :: pool.shape[1]], blocks, 0)
        kv = read_rows(pool.at[blocks].get(mode=IN_BOUNDS)).reshape(*lengths.shape, self.kvs, pool.shape[2])
        return jnp.where(held[..., None], kv, 0.0), held


def prefill_attention(
    query: Array, key: Array, value: Array, raw: RawKVs, *, observe: ObservedQueries | None = None
) -> tuple[Array, tuple[Array, Array] | None]:
    """See ``api.prefill_attention``."""
    batch, length, heads, head_dim = query.shape
    kv_heads = raw.block_table.shape[1]
    tiles = Tiles.of(raw)
    scaled = query.astype(jnp.float32) * head_dim**-0.5
    scaled = scaled.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    key = key.astype(jnp.float32).transpose(0, 2, 1, 3)
    value = value.astype(jnp.float32).transpose(0, 2, 1, 3)
    whole = attend_all(scaled, key, value, tiles)
    output = whole.normalised().transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim).astype(query.dtype)
    return output, None if observe is None else masses(scaled, key, whole, tiles, observe)


def attend_all(scaled: Array, key: Array, value: Array, tiles: Tiles) -> Softmax:
    """The softmax over the cached KVs and, causally, the chunk's own, ``[b, h, length, d]``."""
    *shape, length, head_dim = scaled.shape
    half = tiles.raw.pool.shape[2] // 2

    def attend_cached(i: Array, softmax: Softmax) -> Softmax:
        kv, held = tiles.read(i)
        tile = attend(scaled, kv[..., :head_dim], kv[..., half : half + head_dim], held[:, :, None, None])
        return merge(softmax, tile)

    cached = lax.fori_loop(0, tiles.resident, attend_cached, Softmax.none(*shape, length, head_dim=head_dim))
    parts = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        causal = jnp.arange(end, dtype=jnp.int32) <= jnp.arange(start, end, dtype=jnp.int32)[:, None]
        own = attend(scaled[..., start:end, :], key[:, :, :end], value[:, :, :end], causal)
        before = Softmax(*(x[:, :, :, start:end] for x in cached))
        parts.append(merge(before, own))
    return Softmax(*(jnp.concatenate(xs, axis=3) for xs in zip(*parts, strict=True)))


def masses(scaled: Array, key: Array, whole: Softmax, tiles: Tiles, observe: ObservedQueries) -> tuple[Array, Array]:
    """On the cached keys and on the chunk's own, with the softmax over all of them known."""
    batch, kv_heads, group, length, head_dim = scaled.shape
    heads = kv_heads * group
    real = (observe.rows >= 0)[:, None, None, :, None]
    rows = jnp.maximum(observe.rows, 0)

    def of_rows(x: Array) -> Array:
        """Rows ``[b, w]`` of an array whose queries are on axis 3."""
        index = rows.reshape(batch, 1, 1, -1, *([1] * (x.ndim - 4)))
        return jnp.take_along_axis(x, index, axis=3)

    seen_query, maximum, total = of_rows(scaled), of_rows(whole.maximum), of_rows(whole.total)
    query_positions = jnp.take_along_axis(observe.positions, rows, axis=1)  # [b, w]

    def mass(keys: Array, visible: Array) -> Array:
        """Sum over the observed queries, ``[b, heads, keys]``."""
        p = jnp.exp(logits(seen_query, keys) - maximum[..., None]) / total[..., None]
        return jnp.where(visible & real, observe.function(p), 0.0).sum(3).reshape(batch, heads, -1)

    width, table_kvs = (n * tiles.raw.pool.shape[1] for n in (tiles.raw.block_table.shape[2], tiles.max_blocks))

    def mass_of_tile(i: Array, masses: Array) -> Array:
        kv, held = tiles.read(i)
        visible = held[:, :, None, None]
        if observe.buffer:
            positions = jnp.pad(observe.cached_positions, ((0, 0), (0, 0), (0, width - table_kvs)))
            positions = lax.dynamic_slice_in_dim(positions, i * tiles.kvs, tiles.kvs, axis=2)
            old = positions[:, :, None] <= query_positions[:, None, :, None] - observe.buffer  # [b, h, w, tile]
            visible = visible & old[:, :, None]
        return lax.dynamic_update_slice_in_dim(masses, mass(kv[..., :head_dim], visible), i * tiles.kvs, axis=2)

    on_cached = lax.fori_loop(0, tiles.resident, mass_of_tile, jnp.zeros((batch, heads, width), jnp.float32))
    old = jnp.arange(length, dtype=jnp.int32) <= rows[..., None] - observe.buffer  # [b, w, length]
    return on_cached[..., :table_kvs], mass(key, old[:, None, None])
