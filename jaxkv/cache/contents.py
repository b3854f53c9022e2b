"""Every KV of a cache, wherever it lives: home, score and position in one order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.home import GONE, HIGH, LOW, RAW
from jaxkv.cache.quantised import NoStore, QuantisedStore
from jaxkv.cache.state import PagedCache
from pallas_kernels.kvs import RawKVs
from pallas_kernels.pool_values import read_rows, to_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Contents:
    """All KVs of the sequences' heads, ``[layers, batch, kv_heads, capacity]``: first the high tier's, then the low
    one's, then the unquantised ones in table order. Past a head's end scores and positions mean nothing."""

    home: Array
    """``i32``, of ``Home``; ``GONE`` past a head's end."""
    index: Array
    """``i32`` within its home."""
    scores: Array
    """``f32``."""
    positions: Array
    """``i32``."""

    @property
    def held(self) -> Array:
        """``bool``: where there is a KV."""
        return self.home != GONE


def contents(cache: PagedCache) -> Contents:
    """Reads scores and positions of all that a cache holds."""
    place = jnp.arange(cache.capacity, dtype=jnp.int32)
    scores, positions = cache.raw.scores_and_positions()
    raw = Contents(
        home=jnp.where(place < cache.raw.lengths[..., None], RAW, GONE),
        index=jnp.broadcast_to(place, scores.shape),
        scores=scores,
        positions=positions,
    )
    return raw if isinstance(cache.quantised, NoStore) else _after_quantised(raw, cache.quantised)


def _after_quantised(raw: Contents, store: QuantisedStore) -> Contents:
    """With the quantised KVs before them."""
    capacity = raw.home.shape[-1]
    place = jnp.arange(capacity, dtype=jnp.int32)
    high, low = store.tables.lengths[..., HIGH, None], store.tables.lengths[..., LOW, None]
    before = high + low
    moved = jnp.clip(place - before, 0, capacity - 1)
    home, scores, positions = (jnp.take_along_axis(x, moved, axis=-1) for x in (raw.home, raw.scores, raw.positions))
    home = jnp.where(place < high, HIGH, jnp.where(place < before, LOW, home))
    index = place - jnp.where(home == HIGH, 0, jnp.where(home == LOW, high, before))

    def read(values: tuple[Array, Array]) -> tuple[Array, Array]:
        for tier in (HIGH, LOW):
            of_tier = store.scores_and_positions(tier)
            at = jnp.minimum(index, of_tier[0].shape[-1] - 1)
            new = [jnp.take_along_axis(part, at, axis=-1) for part in of_tier]
            values = jax.tree.map(lambda x, y, tier=tier: jnp.where(home == tier, y, x), values, tuple(new))
        return values

    scores, positions = lax.cond(jnp.any(before > 0), read, lambda values: values, (scores, positions))
    return Contents(home=home, index=index, scores=scores, positions=positions)


def with_scores(cache: PagedCache, scores: Array, positions: Array, rows: Array) -> PagedCache:
    """New scores for every KV of the rows, ``bool[batch]``, and new positions for the quantised ones.

    Args:
      cache: donated.
      scores: ``f32[layers, batch, kv_heads, capacity]`` in the order of ``contents``.
      positions: ``i32`` of the same shape; for the other rows both must be as they were.
      rows: which sequences.
    """
    raw = cache.raw.with_scores(of_raw(cache, scores), rows)
    return replace(cache, raw=raw, quantised=cache.quantised.with_scores(scores, positions))


def of_raw(cache: PagedCache, values: Array) -> Array:
    """Those of the unquantised KVs, in table order, of values in the order of ``contents``."""
    if isinstance(cache.quantised, NoStore):
        return values
    index = jnp.arange(cache.capacity, dtype=jnp.int32) + cache.quantised.num_kvs()[..., None]
    return jnp.take_along_axis(values, jnp.minimum(index, cache.capacity - 1), axis=-1)


def read_layer(cache: PagedCache, now: Contents, layer: int | Array) -> tuple[Array, Array]:
    """K and V of a layer, ``f32[batch, kv_heads, capacity, head_dim]``, in the order of ``now``."""
    raw, home, index = cache.raw, now.home[layer], now.index[layer]
    half = raw.pool.shape[2] // 2
    unquantised = jnp.where(home == RAW, index, 0)
    block = jnp.take_along_axis(raw.tables.block_table[layer], unquantised // raw.block_size, axis=-1)
    rows = read_rows(raw.pool[jnp.where(home == RAW, block, 0), unquantised % raw.block_size])
    kv = rows[..., : raw.head_dim], rows[..., half : half + raw.head_dim]
    return cache.quantised.read_over(kv, layer, home, index)


def readable(cache: PagedCache, now: Contents, layer: int | Array) -> tuple[RawKVs, Array]:
    """All of a layer's KVs as the kernel of prompt attention takes them, and their positions.

    What is quantised is dequantised for it, into a pool of its own. Positions are ``i32[batch, kv_heads, capacity]``.
    """
    if isinstance(cache.quantised, NoStore):
        return cache.raw.view(layer), cache.raw.positions_of(layer)
    kv = read_layer(cache, now, layer)
    batch, kv_heads, _, head_dim = kv[0].shape
    half = cache.raw.pool.shape[2] // 2
    pad = ((0, 0),) * 3 + ((0, half - head_dim),)
    rows = to_rows(jnp.concatenate([jnp.pad(part, pad) for part in kv], axis=-1), cache.raw.pool.dtype)
    pool = rows.reshape(-1, cache.raw.block_size, 2 * half)
    table = jnp.arange(pool.shape[0], dtype=jnp.int32).reshape(batch, kv_heads, -1)
    return RawKVs(pool, table, cache.lengths[layer]), now.positions[layer]


def unquantised(cache: PagedCache) -> PagedCache:
    """The cache as one without quantised blocks: of rows that hold none, which is then known when it is compiled."""
    return replace(cache, quantised=NoStore())
