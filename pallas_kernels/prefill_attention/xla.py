"""Chunk attention in plain XLA: the oracle of the kernels' tests, and the path on CPU.

Cached keys are taken a tile at a time by a loop whose bound is data, the chunk's own keys in query blocks that see
only the keys before their end; nothing of size length x context exists. Softmax results are merged by their running
maximum and sum.
"""

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


def prefill_attention(
    query: Array,
    key: Array,
    value: Array,
    raw: RawKVs,
    *,
    observe: ObservedQueries | None = None,
) -> tuple[Array, tuple[Array, Array] | None]:
    """See ``api.prefill_attention``."""
    batch, length, heads, head_dim = query.shape
    pool, block_table, lengths = raw
    kv_heads, max_blocks = block_table.shape[1:]
    group = heads // kv_heads
    block_size, half = pool.shape[1], pool.shape[2] // 2
    tile_blocks = min(max(1, TILE_KVS // block_size), max_blocks)
    tile_kvs = tile_blocks * block_size
    max_tiles = -(-max_blocks // tile_blocks)
    table = jnp.pad(block_table, ((0, 0), (0, 0), (0, max_tiles * tile_blocks - max_blocks)))
    tiles = -(-jnp.max(lengths) // tile_kvs)

    scaled = query.astype(jnp.float32) * head_dim**-0.5
    scaled = scaled.reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    key = key.astype(jnp.float32).transpose(0, 2, 1, 3)
    value = value.astype(jnp.float32).transpose(0, 2, 1, 3)

    def cached_tile(i: Array) -> tuple[Array, Array]:
        """K beside V ``[b, h, tile, 2 * half]`` of tile ``i`` and which of its slots hold a KV ``[b, h, tile]``."""
        index = i * tile_kvs + jnp.arange(tile_kvs)
        held = index < lengths[..., None]
        blocks = lax.dynamic_slice_in_dim(table, i * tile_blocks, tile_blocks, axis=2)
        blocks = jnp.where(held[..., ::block_size], blocks, 0)
        kv = read_rows(pool.at[blocks].get(mode=IN_BOUNDS)).reshape(batch, kv_heads, tile_kvs, 2 * half)
        return jnp.where(held[..., None], kv, 0.0), held

    def attend_cached(i: Array, softmax: Softmax) -> Softmax:
        kv, held = cached_tile(i)
        tile = attend(scaled, kv[..., :head_dim], kv[..., half : half + head_dim], held[:, :, None, None])
        return merge(softmax, tile)

    shape = (batch, kv_heads, group, length)
    nothing = Softmax.none(*shape, head_dim=head_dim)
    cached = lax.fori_loop(0, tiles, attend_cached, nothing)

    parts = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        causal = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        own = attend(scaled[..., start:end, :], key[:, :, :end], value[:, :, :end], causal)
        before = Softmax(*(x[:, :, :, start:end] for x in cached))
        parts.append(merge(before, own))
    whole = Softmax(*(jnp.concatenate(xs, axis=3) for xs in zip(*parts, strict=True)))
    output = whole.normalised().transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim).astype(query.dtype)
    if observe is None:
        return output, None

    rows = observe.rows
    real = (rows >= 0)[:, None, None, :, None]
    rows = jnp.maximum(rows, 0)

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

    def mass_of_tile(i: Array, masses: Array) -> Array:
        kv, held = cached_tile(i)
        visible = held[:, :, None, None]
        if observe.buffer:
            width = max_tiles * tile_kvs - max_blocks * block_size
            positions = jnp.pad(observe.cached_positions, ((0, 0), (0, 0), (0, width)))
            positions = lax.dynamic_slice_in_dim(positions, i * tile_kvs, tile_kvs, axis=2)
            old = positions[:, :, None] <= query_positions[:, None, :, None] - observe.buffer  # [b, h, w, tile]
            visible = visible & old[:, :, None]
        return lax.dynamic_update_slice_in_dim(masses, mass(kv[..., :head_dim], visible), i * tile_kvs, axis=2)

    on_cached = lax.fori_loop(0, tiles, mass_of_tile, jnp.zeros((batch, heads, max_tiles * tile_kvs)))
    old = jnp.arange(length) <= rows[..., None] - observe.buffer  # [b, w, length]
    on_own = mass(key, old[:, None, None])
    return output, (on_cached[..., : max_blocks * block_size], on_own)
