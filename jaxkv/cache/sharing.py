"""Rows that hold the same blocks: forked by reference, and copied before one of them changes what it holds.

A full block is only ever read, until something is evicted, scored or quantised anew. So a fork copies no more than
each head's last block, where that isn't full, because the next token is written there. ``own`` makes the rest a row's
own, and whatever changes old KVs calls it first: ``compress``, the end of a prompt that a policy scores, and decoding
by a policy that acts in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.quantised import NoStore, QuantisedStore
from jaxkv.cache.raw import RawStore
from jaxkv.cache.state import PagedCache
from pallas_kernels.settings import any_ranks

Store = TypeVar("Store", RawStore, QuantisedStore)


@any_ranks
def fork(cache: PagedCache, row: Array | int, into: Array) -> tuple[PagedCache, Array]:
    """Has other rows hold what a row holds, by reference.

    Args:
      cache: donated.
      row: ``i32[]``; stays as it is.
      into: ``i32[n]``, different rows; what they held before is released.

    Returns:
      As ``reorder``.
    """
    rows = jnp.arange(cache.num_tokens.shape[0], dtype=jnp.int32)
    return reorder(cache, rows.at[into].set(jnp.asarray(row, jnp.int32)))


@any_ranks
def reorder(cache: PagedCache, rows: Array) -> tuple[PagedCache, Array]:
    """Has each row hold what another did, as beam search wants it: several may continue one, and some none.

    Args:
      cache: donated.
      rows: ``i32[batch]``: whose contents each row gets.

    Returns:
      The cache and ``bool[]`` granted: where too few blocks are free for the last, part-filled ones, of which each row
      needs its own, nothing has changed and granted is False.
    """
    rows = jnp.asarray(rows, jnp.int32)
    tables = cache.raw.tables.reorder(rows)
    again = jnp.argmax(rows == rows[:, None], axis=1) != jnp.arange(rows.shape[0])
    copied = again[:, None] & (tables.lengths[..., 0] % cache.raw.block_size > 0)
    granted = cache.shards.everywhere(jnp.sum(copied, dtype=jnp.int32) <= tables.free.count)

    def if_granted(new: Array, old: Array) -> Array:
        return jnp.where(granted, new, old)

    raw = replace(cache.raw, tables=jax.tree.map(if_granted, tables, cache.raw.tables))
    quantised = cache.quantised.reorder(rows)
    if isinstance(quantised, QuantisedStore):
        before = cache.tiers
        quantised = replace(
            quantised,
            tables=jax.tree.map(if_granted, quantised.tables, before.tables),
            weakest=jax.tree.map(if_granted, quantised.weakest, before.weakest),
        )
    last = jnp.maximum(raw.tables.blocks_held() - 1, 0)
    raw = _with_copies(raw, last, (copied & granted)[..., None])
    num_tokens = if_granted(cache.num_tokens[rows], cache.num_tokens)
    return PagedCache(raw=raw, quantised=quantised, num_tokens=num_tokens), granted


def own(cache: PagedCache, rows: Array) -> tuple[PagedCache, Array]:
    """Gives rows, ``bool[batch]``, copies of the blocks that others hold, too.

    Returns:
      The cache, donated, and ``bool[batch]``: those of the rows that own all they hold now. Of the others nothing has
      changed: too few blocks are free.
    """

    def one(row: Array, state: tuple[PagedCache, Array]) -> tuple[PagedCache, Array]:
        cache, owned = state
        part = cache.rows(row[None])
        does = rows[row] & can_own(part)
        quantised = part.quantised
        quantised = quantised if isinstance(quantised, NoStore) else _own_store(part.tiers, does)
        part = replace(part, raw=_own_store(part.raw, does), quantised=quantised)
        return cache.with_rows(part, row[None]), owned.at[row].set(does)

    # Loops that end at once, not conditionals: inside other loops XLA would copy the pools for those.
    shares = any_shared(cache) & jnp.any(rows)
    return lax.fori_loop(0, jnp.where(shares, rows.shape[0], 0), one, (cache, rows))


def any_shared(cache: PagedCache) -> Array:
    """``bool[]``: whether any block has several holders, on any device."""
    found = cache.raw.tables.free.any_shared()
    if not isinstance(cache.quantised, NoStore):
        found |= cache.tiers.tables.free.any_shared()
    return ~cache.shards.everywhere(~found)


def can_own(cache: PagedCache, rows: Array | bool = True) -> Array:
    """``bool[]``: whether blocks are free for copies of all that rows, ``bool[batch]`` or all, share, on all
    devices."""
    stores = [cache.raw] if isinstance(cache.quantised, NoStore) else [cache.raw, cache.tiers]
    rows = jnp.reshape(jnp.asarray(rows), (1, -1, 1, 1))
    need = [jnp.sum(store.tables.shared() & rows, dtype=jnp.int32) for store in stores]
    enough = [blocks <= store.tables.free.count for blocks, store in zip(need, stores, strict=True)]
    return cache.shards.everywhere(jnp.all(jnp.stack(enough)))


def _own_store(store: Store, does: Array) -> Store:
    which = store.tables.shared() & does
    place = jnp.arange(store.tables.max_blocks, dtype=jnp.int32)
    return _with_copies(store, jnp.broadcast_to(place, which.shape), which)


def _with_copies(store: Store, columns: Array, which: Array) -> Store:
    """Copies in the place of blocks that others hold, too; enough must be free.

    Args:
      store: donated.
      columns: ``i32[layers, batch, kv_heads, n]``, of the table.
      which: ``bool`` like columns.
    """
    tables = store.tables
    need = which.sum(-1, dtype=jnp.int32)
    free, new, _ = tables.free.pop(need, which.shape[-1])
    rank = jnp.maximum(jnp.cumsum(which, axis=-1, dtype=jnp.int32) - 1, 0)
    source = jnp.take_along_axis(tables.block_table, columns, axis=-1)
    target = jnp.where(which, jnp.take_along_axis(new, rank, axis=-1), store.pool.shape[0])

    def layer(i: Array, store: Store) -> Store:
        return store.copy_blocks(source[i], target[i])

    # A layer at a time: the temporary copy is that of one.
    store = lax.fori_loop(0, jnp.where(jnp.any(which), which.shape[0], 0), layer, store)
    at, row, head, _ = jnp.ogrid[tuple(slice(n) for n in which.shape)]
    table = tables.block_table.at[at, row, head, jnp.where(which, columns, tables.max_blocks)].set(target, mode="drop")
    return replace(store, tables=replace(tables, block_table=table, free=free.push(source, which)))
