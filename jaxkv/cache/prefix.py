"""Blocks that prompts which start alike share: read once, held by every row that begins with them.

A ``Prefix`` is one of the holders of its blocks, beside the row that read them and those that begin with them. They are
only ever read, until a row gets copies of its own (``cache.sharing``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array

from jaxkv.cache.shards import by_head
from jaxkv.cache.state import PagedCache
from jaxkv.cache.tables import HeadTables


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Uncompressed blocks, as many of every head."""

    table: Array = field(metadata=by_head(1))
    """``i32[layers, kv_heads, max_blocks]``."""
    blocks: Array
    """``i32[]``: how many of each head's entries there are."""

    def first(self, blocks: Array) -> Array:
        """``bool`` like the table: the first ``blocks``, ``i32[]``, of each head."""
        return jnp.broadcast_to(jnp.arange(self.table.shape[-1], dtype=jnp.int32) < blocks, self.table.shape)


def detach(cache: PagedCache, row: Array) -> tuple[PagedCache, Prefix]:
    """Makes a prefix of all that a row holds, which goes on holding it.

    Args:
      cache: donated.
      row: ``i32[]``, of a sequence that was never compressed, and fills its blocks.
    """
    tables = cache.raw.tables
    prefix = Prefix(table=tables.block_table[:, row], blocks=cache.num_tokens[row] // cache.raw.block_size)
    free = tables.free.share(prefix.table, prefix.first(prefix.blocks))
    return _with_tables(cache, replace(tables, free=free)), prefix


def attach(cache: PagedCache, row: Array, prefix: Prefix, blocks: Array) -> PagedCache:
    """Begins an empty row with the first blocks, ``i32[]``, of each head of a prefix."""
    tokens, tables = blocks * cache.raw.block_size, cache.raw.tables
    tables = replace(
        tables,
        block_table=tables.block_table.at[:, row].set(prefix.table),
        lengths=tables.lengths.at[:, row].set(tokens),
        free=tables.free.share(prefix.table, prefix.first(blocks)),
    )
    return replace(_with_tables(cache, tables), num_tokens=cache.num_tokens.at[row].set(tokens))


def cut(cache: PagedCache, prefix: Prefix, blocks: Array) -> tuple[PagedCache, Prefix]:
    """Gives back what of each head of a prefix lies past so many blocks, ``i32[]``."""
    given = prefix.first(prefix.blocks) & ~prefix.first(blocks)
    tables = cache.raw.tables
    free = tables.free.push(prefix.table, given)
    return _with_tables(cache, replace(tables, free=free)), replace(prefix, blocks=blocks)


def _with_tables(cache: PagedCache, tables: HeadTables) -> PagedCache:
    return replace(cache, raw=replace(cache.raw, tables=tables))
