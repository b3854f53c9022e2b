"""Which blocks of a pool each head holds: the tables of a store, whatever its blocks are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxkv.cache.free_list import FreeList
from jaxkv.cache.nbytes import nbytes
from jaxkv.cache.shards import WHOLE, HeadShards, by_head


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class HeadTables:
    """Every KV head of every layer of every sequence has a row of block ids, and all take theirs from one free list.

    A store has one tier, or two: a row's blocks of the first stand from the left, those of the second from the right
    (LeanKV, section 5). Allocation is by ranks, for all heads at once: no serial loop, no host.
    """

    block_table: Array = field(metadata=by_head(2))
    """``i32[layers, batch, kv_heads, max_blocks]``; entries that no block of the head's stands in are never read."""
    lengths: Array = field(metadata=by_head(2))
    """``i32[layers, batch, kv_heads, tiers]``: KVs that a head holds in each tier."""
    free: FreeList
    kvs_a_block: tuple[int, ...] = field(metadata={"static": True})
    """Of each tier."""
    shards: HeadShards = field(default=WHOLE, metadata={"static": True})
    """How the heads are split over devices."""

    @classmethod
    def empty(
        cls,
        heads: tuple[int, int, int],
        *,
        max_blocks: int,
        num_blocks: int,
        kvs_a_block: tuple[int, ...],
        shards: HeadShards = WHOLE,
    ) -> HeadTables:
        """Of ``(layers, batch, kv_heads)`` heads that hold nothing, over a pool of ``num_blocks`` a device."""
        return cls(
            block_table=jnp.zeros((*heads, max_blocks), jnp.int32),
            lengths=jnp.zeros((*heads, len(kvs_a_block)), jnp.int32),
            free=FreeList.of(num_blocks, shards),
            kvs_a_block=kvs_a_block,
            shards=shards,
        )

    @property
    def max_blocks(self) -> int:
        return self.block_table.shape[-1]

    @property
    def row_bytes(self) -> int:
        """Bytes of a sequence's table rows and lengths."""
        return nbytes((self.block_table, self.lengths)) // self.lengths.shape[1]

    def num_blocks(self, lengths: Array) -> Array:
        """Blocks of each tier that so many KVs fill, ``i32[..., tiers]``."""
        return -(-lengths // np.array(self.kvs_a_block, np.int32))

    def blocks_held(self) -> Array:
        """``i32[layers, batch, kv_heads, tiers]``."""
        return self.num_blocks(self.lengths)

    def has_room(self, lengths: Array) -> Array:
        """``bool[]``: whether ``grow`` can give the heads ``lengths`` KVs, on all devices."""
        want = self.num_blocks(lengths)
        enough = jnp.sum(want - self.blocks_held(), dtype=jnp.int32) <= self.free.count
        return self.shards.everywhere(enough & jnp.all(want.sum(-1, dtype=jnp.int32) <= self.max_blocks))

    def grow(self, lengths: Array, *, most: int) -> tuple[HeadTables, Array]:
        """Gives each head the blocks for ``lengths`` KVs, all heads or none.

        Args:
          lengths: ``i32[layers, batch, kv_heads, tiers]``, none shorter than present.
          most: bound on the KVs that a head's tier grows by; static.

        Returns:
          The tables with the new blocks and lengths and ``bool[]`` granted. Where the pool has too few free blocks, or
          a table row is too short, nothing changes and granted is False.
        """
        have = self.blocks_held()
        granted = self.has_room(lengths)
        need = jnp.where(granted, self.num_blocks(lengths) - have, 0)
        free, blocks, real = self.free.pop(need, -(-most // min(self.kvs_a_block)))
        column = self._column(have[..., None] + jnp.arange(blocks.shape[-1], dtype=jnp.int32))
        column = jnp.where(real, column, self.max_blocks)
        layer, sequence, head, _, _ = jnp.ogrid[tuple(slice(n) for n in (*have.shape, 1))]
        table = self.block_table.at[layer, sequence, head, column].set(blocks, mode="drop")
        lengths = jnp.where(granted, lengths, self.lengths)
        return replace(self, block_table=table, lengths=lengths, free=free), granted

    def shrink(self, lengths: Array) -> HeadTables:
        """Cuts each head to ``lengths`` KVs; it no longer holds the blocks past them."""
        freed = self.occupied() & ~replace(self, lengths=lengths).occupied()
        return replace(self, lengths=lengths, free=self._given_back(self.free, freed))

    def reorder(self, rows: Array) -> HeadTables:
        """Each row holds what row ``rows``, ``i32[batch]``, did: the same blocks, shared by all that hold them."""
        moved = replace(self, block_table=self.block_table[:, rows], lengths=self.lengths[:, rows])
        free = self.free.share(moved.block_table, moved.occupied())
        return replace(moved, free=self._given_back(free, self.occupied()))

    def occupied(self) -> Array:
        """``bool`` like the table: entries in which a block stands."""
        place, held = jnp.arange(self.max_blocks, dtype=jnp.int32), self.blocks_held()
        stands = place < held[..., 0, None]
        return stands if len(self.kvs_a_block) == 1 else stands | (place[::-1] < held[..., 1, None])

    def shared(self) -> Array:
        """``bool`` like the table: entries in which a block stands that others hold, too."""
        return self.occupied() & (self.free.others[self.block_table] > 0)

    def _given_back(self, free: FreeList, which: Array) -> FreeList:
        """The free list with blocks that stand here, ``bool`` like the table; a row after the other, since rows may
        hold the same ones."""
        if which.shape[1] == 1:
            return free.push(self.block_table, which)

        def row(i: Array, free: FreeList) -> FreeList:
            return free.push(self.block_table[:, i], which[:, i])

        return lax.fori_loop(0, which.shape[1], row, free)

    def from_left(self, tier: int) -> Array:
        """The table with a tier's blocks from the left."""
        return self.block_table if tier == 0 else self.block_table[..., ::-1]

    def slots(self, tier: int, index: Array) -> tuple[Array, Array]:
        """Block and offset of each head's ``index``-th KVs of a tier, ``i32[layers, batch, kv_heads, ...]``."""
        size = self.kvs_a_block[tier]
        column = jnp.clip(index // size, 0, self.max_blocks - 1)
        table = self.from_left(tier)
        flat = column.reshape(*table.shape[:3], -1)
        return jnp.take_along_axis(table, flat, axis=-1).reshape(index.shape), index % size

    def rows(self, which: Array) -> HeadTables:
        """Of only these rows of the batch, ``i32[n]``, over the same pool."""
        return replace(self, block_table=self.block_table[:, which], lengths=self.lengths[:, which])

    def with_rows(self, part: HeadTables, which: Array) -> HeadTables:
        """Rows ``which`` and the free list from ``part``, the other rows from these."""
        return replace(
            part,
            block_table=self.block_table.at[:, which].set(part.block_table),
            lengths=self.lengths.at[:, which].set(part.lengths),
        )

    def _column(self, index: Array) -> Array:
        """Where a tier's ``index``-th block stands in its row, ``i32[..., tiers, n]``."""
        if len(self.kvs_a_block) == 1:
            return index
        return jnp.where(np.array([[True], [False]]), index, self.max_blocks - 1 - index)
