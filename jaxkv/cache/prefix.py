"""Blocks that prompts which start alike share: read once, referred to by every row that begins with them.

A row's prefix is detached: its blocks belong to the ``Prefix``, and the first ``shared`` blocks of each of the row's
heads are only borrowed. Other rows attach them. Borrowed blocks are read, never written nor freed by a row; before a
policy scores and evicts, the row takes a copy of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.shards import by_head
from jaxkv.cache.state import PagedCache
from pallas_kernels import slot_values


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Uncompressed blocks, as many of every head, that no row owns."""

    table: Array = field(metadata=by_head(1))
    """``i32[layers, kv_heads, max_blocks]``."""
    blocks: Array
    """``i32[]``: how many of each head's entries there are."""


def detach(cache: PagedCache, row: Array) -> tuple[PagedCache, Prefix]:
    """Makes a prefix of all that a row holds, which only borrows it from now on.

    Args:
      cache: donated.
      row: ``i32[]``, of a sequence that owns all its blocks, was never compressed, and fills its blocks.
    """
    blocks = cache.num_tokens[row] // cache.raw.block_size
    prefix = Prefix(table=cache.raw.tables.block_table[:, row], blocks=blocks)
    return replace(cache, shared=cache.shared.at[row].set(blocks)), prefix


def attach(cache: PagedCache, row: Array, prefix: Prefix, blocks: Array) -> PagedCache:
    """Begins an empty row with the first blocks, ``i32[]``, of each head of a prefix."""
    tokens, tables = blocks * cache.raw.block_size, cache.raw.tables
    tables = replace(
        tables,
        block_table=tables.block_table.at[:, row].set(prefix.table),
        lengths=tables.lengths.at[:, row].set(tokens),
    )
    return replace(
        cache,
        raw=replace(cache.raw, tables=tables),
        num_tokens=cache.num_tokens.at[row].set(tokens),
        shared=cache.shared.at[row].set(blocks),
    )


def cut(cache: PagedCache, prefix: Prefix, blocks: Array) -> tuple[PagedCache, Prefix]:
    """Gives back what of each head of a prefix lies past so many blocks, ``i32[]``; no row may borrow it."""
    place = jnp.arange(prefix.table.shape[-1], dtype=jnp.int32)
    freed = jnp.broadcast_to((place >= blocks) & (place < prefix.blocks), prefix.table.shape)
    tables = replace(cache.raw.tables, free=cache.raw.tables.free.push(prefix.table, freed))
    return replace(cache, raw=replace(cache.raw, tables=tables)), replace(prefix, blocks=blocks)


def own(cache: PagedCache, row: Array) -> PagedCache:
    """Gives a row its own copy of what it borrows; ``shared[row] * layers * kv_heads`` blocks must be free."""
    raw, tables, size = cache.raw, cache.raw.tables, cache.raw.block_size
    old = tables.block_table[:, row]
    layers, kv_heads, max_blocks = old.shape
    free, new, borrowed = tables.free.pop(jnp.full((layers, kv_heads), cache.shared[row]), max_blocks)

    def copy_layer(layer: Array, values: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        pool, scores, positions = values
        source = jnp.where(borrowed[layer], old[layer], 0)
        target = jnp.where(borrowed[layer], new[layer], pool.shape[0])
        pool = pool.at[target].set(pool[source], mode="drop")
        scores, positions = (
            slot_values.write_blocks(values, new[layer], slot_values.read_blocks(values, source, size), borrowed[layer])
            for values in (scores, positions)
        )
        return pool, scores, positions

    # A layer at a time: the temporary copy is that of one.
    pool, scores, positions = lax.fori_loop(0, layers, copy_layer, (raw.pool, raw.scores, raw.positions))
    table = tables.block_table.at[:, row].set(jnp.where(borrowed, new, old))
    tables = replace(tables, block_table=table, free=free)
    raw = replace(raw, pool=pool, scores=scores, positions=positions, tables=tables)
    return replace(cache, raw=raw, shared=cache.shared.at[row].set(0))
