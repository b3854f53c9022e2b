"""What one row holds, apart from any cache: the bytes of its blocks as they are held, to be put into another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array

from jaxkv.cache.nbytes import nbytes
from jaxkv.cache.quantised import NoStore
from jaxkv.cache.state import PagedCache
from jaxkv.cache.tables import HeadTables
from pallas_kernels import slot_values
from pallas_kernels.paged_attention import Weakest
from pallas_kernels.quantised_block import BlockLayout


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Blocks are in the order of the row's table: layer by layer, head by head, from the left."""

    pool: Array
    """``[blocks, block_size, row_width]`` of the unquantised store."""
    scores: Array
    """``f32[blocks, block_size]``."""
    positions: Array
    """``i32[blocks, block_size]``."""
    lengths: Array
    """``i32[layers, kv_heads, 1]``: unquantised KVs of each head."""
    num_tokens: Array
    """``i32[]`` of the text."""
    quantised: Array | None = None
    """``u32[blocks, rows, 128]`` of the quantised store, where there is one."""
    quantised_lengths: Array | None = None
    """``i32[layers, kv_heads, 2]``."""
    weakest: Weakest | None = None
    """``[layers, kv_heads, 2]``."""
    layout: BlockLayout | None = field(default=None, metadata={"static": True})

    @property
    def nbytes(self) -> int:
        return nbytes(self)

    @property
    def blocks(self) -> tuple[int, int]:
        """Unquantised and quantised ones."""
        return len(self.pool), 0 if self.quantised is None else len(self.quantised)


def take(cache: PagedCache, row: int) -> Snapshot:
    """Copies what a row holds; the cache stays as it is. Reads its table back, so it is for the host."""
    raw, size = cache.raw, cache.raw.block_size
    blocks = _blocks_of(raw.tables, row)
    taken = Snapshot(
        pool=raw.pool[blocks],
        scores=slot_values.read_blocks(raw.scores, blocks, size),
        positions=slot_values.read_blocks(raw.positions, blocks, size),
        lengths=raw.tables.lengths[:, row],
        num_tokens=cache.num_tokens[row],
    )
    if isinstance(cache.quantised, NoStore):
        return taken
    store = cache.tiers
    return replace(
        taken,
        quantised=store.pool[_blocks_of(store.tables, row)],
        quantised_lengths=store.tables.lengths[:, row],
        weakest=jax.tree.map(lambda x: x[:, row], store.weakest),
        layout=store.layout,
    )


def put(cache: PagedCache, row: Array, snapshot: Snapshot) -> tuple[PagedCache, Array]:
    """Has an empty row hold what was taken.

    Args:
      cache: donated; of the same model, block size, dtype and layout of quantised blocks.
      row: ``i32[]``.
      snapshot: what was taken.

    Returns:
      The cache and ``bool[]`` granted: where too few blocks are free, nothing has changed and granted is False.
    """
    part = cache.rows(row[None])
    tables, granted = _grown(part.raw.tables, snapshot.lengths)
    at = _places(tables, len(snapshot.pool), granted, part.raw.pool.shape[0])
    goes = at < part.raw.pool.shape[0]
    raw = replace(
        part.raw,
        pool=part.raw.pool.at[at].set(snapshot.pool, mode="drop"),
        scores=slot_values.write_blocks(part.raw.scores, at, snapshot.scores, goes),
        positions=slot_values.write_blocks(part.raw.positions, at, snapshot.positions, goes),
        tables=tables,
    )
    quantised = part.quantised
    if snapshot.quantised is not None and snapshot.quantised_lengths is not None:
        store = part.tiers
        tables, found = _grown(store.tables, jnp.where(granted, snapshot.quantised_lengths, 0))
        at = _places(tables, len(snapshot.quantised), found, store.pool.shape[0])
        weakest = jax.tree.map(lambda x: x[:, None], snapshot.weakest)
        pool = store.pool.at[at].set(snapshot.quantised, mode="drop")
        quantised = replace(store, pool=pool, tables=tables, weakest=weakest)
        raw = replace(raw, tables=raw.tables.shrink(jnp.where(found, raw.tables.lengths, 0)))
        granted &= found
    num_tokens = jnp.where(granted, snapshot.num_tokens, 0)[None]
    return cache.with_rows(PagedCache(raw=raw, quantised=quantised, num_tokens=num_tokens), row[None]), granted


def _blocks_of(tables: HeadTables, row: int) -> Array:
    table, occupied = jax.device_get((tables.block_table[:, row], tables.occupied()[:, row]))
    return jnp.asarray(table[occupied])


def _grown(tables: HeadTables, lengths: Array) -> tuple[HeadTables, Array]:
    return tables.grow(lengths[:, None], most=tables.max_blocks * min(tables.kvs_a_block))


def _places(tables: HeadTables, blocks: int, granted: Array, nowhere: int) -> Array:
    """``i32[blocks]``: which block of the pool each becomes."""
    occupied = tables.occupied().reshape(-1)
    order = jnp.where(occupied, jnp.cumsum(occupied, dtype=jnp.int32) - 1, blocks)
    at = jnp.full(blocks, nowhere, jnp.int32).at[order].set(tables.block_table.reshape(-1), mode="drop")
    return jnp.where(granted, at, nowhere)
