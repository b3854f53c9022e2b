"""The unquantised store: K and V as computed, a score and a position beside each KV."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxkv.cache.shards import WHOLE, HeadShards, by_head
from jaxkv.cache.tables import HeadTables
from pallas_kernels import slot_values
from pallas_kernels.kvs import RawKVs
from pallas_kernels.pool_values import pool_dtype
from pallas_kernels.quantised_block.hadamard import turned
from pallas_kernels.walk import walk

LANES = 128
"""Scores and positions lie in rows of 128: a narrower minor dimension is laid out anew on every TPU call."""
NULL_BLOCK = 0
"""Masked reads and writes go there; it is never handed out."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RawStore:
    """Donated with the cache that it is a part of. ``pool``, ``scores`` and ``positions`` are indexed by token slot,
    ``block * block_size + offset``. A head's KVs are in the order of its table row, not of the text."""

    pool: Array = field(metadata=by_head(0))
    """``[blocks, block_size, row_width]``, K (after RoPE) beside V, each at the beginning of its half of the row.
    ``uint16`` where bfloat16 is kept as bits (``pallas_kernels.pool_values``)."""
    scores: Array = field(metadata=by_head(0))
    """``f32[rows, 128]``: the metric of each slot's KV."""
    positions: Array = field(metadata=by_head(0))
    """``i32[rows, 128]``: the place in the text of each slot's KV."""
    tables: HeadTables
    head_dim: int = field(metadata={"static": True})
    """Values of K, and of V, of a KV; a half of the row may be wider."""
    hadamard: bool = field(default=False, metadata={"static": True})
    """Whether K and V are turned, as those of the quantised store are; see ``turned``."""

    @classmethod
    def empty(
        cls,
        heads: tuple[int, int, int],
        *,
        num_blocks: int,
        block_size: int,
        max_blocks: int,
        row_width: int,
        head_dim: int,
        dtype: DTypeLike,
        hadamard: bool = False,
        shards: HeadShards = WHOLE,
    ) -> RawStore:
        rows = shards.count * -(-num_blocks * block_size // LANES)
        return cls(
            pool=jnp.zeros((shards.count * num_blocks, block_size, row_width), pool_dtype(jnp.dtype(dtype))),
            scores=jnp.zeros((rows, LANES), jnp.float32),
            positions=jnp.zeros((rows, LANES), jnp.int32),
            tables=HeadTables.empty(
                heads, max_blocks=max_blocks, num_blocks=num_blocks, kvs_a_block=(block_size,), shards=shards
            ),
            head_dim=head_dim,
            hadamard=hadamard,
        )

    def turned(self, vectors: Array) -> Array:
        """Queries, keys or values ``[..., head_dim]`` as those that are cached are, or of such ones what they were."""
        return turned(vectors) if self.hadamard else vectors

    @property
    def block_size(self) -> int:
        return self.pool.shape[1]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, with the score and the position of each of its slots."""
        slot = self.scores.dtype.itemsize + self.positions.dtype.itemsize
        return self.block_size * (self.pool.shape[2] * self.pool.dtype.itemsize + slot)

    @property
    def capacity(self) -> int:
        """KVs that a head's table row can address."""
        return self.tables.max_blocks * self.block_size

    @property
    def lengths(self) -> Array:
        """``i32[layers, batch, kv_heads]``: KVs that a head holds."""
        return self.tables.lengths[..., 0]

    def scores_and_positions(self) -> tuple[Array, Array]:
        """Of all heads' KVs in table order, ``[layers, batch, kv_heads, capacity]``; past a head's end they mean
        nothing."""
        table = self.tables.block_table, self.lengths
        return in_table_order(self.scores, *table, self.block_size), in_table_order(
            self.positions, *table, self.block_size
        )

    def with_scores(self, scores: Array, rows: Array) -> RawStore:
        """New scores of the KVs of the rows, ``bool[batch]``, in table order."""
        lengths = jnp.where(rows[:, None], self.lengths, 0)
        return replace(self, scores=to_slots(self.scores, self.tables.block_table, lengths, scores))

    def stamp(self, starts: Array, positions: Array, counts: Array) -> RawStore:
        """Gives new KVs score 0, whatever their slot's last owner had, and their position in the text.

        Args:
          starts: ``i32[layers, batch, kv_heads]`` index of the first new KV within its head; its block is allocated.
          positions: ``i32[batch, new]``.
          counts: ``i32[batch]`` how many of ``new`` are real.
        """
        place = jnp.arange(positions.shape[1], dtype=jnp.int32)
        block, offset = self.tables.slots(0, starts[..., None] + place)  # [layers, batch, kv_heads, new]
        real = place < counts[None, :, None, None]
        slots = jnp.where(real, block * self.block_size + offset, NULL_BLOCK)
        new = jnp.broadcast_to(positions[None, :, None], slots.shape)
        row, lane = slots // LANES, slots % LANES
        return replace(
            self,
            scores=self.scores.at[row, lane].set(0.0, mode="promise_in_bounds"),
            positions=self.positions.at[row, lane].set(new, mode="promise_in_bounds"),
        )

    def copy_blocks(self, source: Array, target: Array) -> RawStore:
        """Blocks ``source``, ``i32[...]``, also as ``target``; one past the pool for nowhere."""
        goes, size = target < self.pool.shape[0], self.block_size
        scores, positions = (
            slot_values.write_blocks(values, target, slot_values.read_blocks(values, source, size), goes)
            for values in (self.scores, self.positions)
        )
        pool = self.pool.at[target].set(self.pool[source], mode="drop")
        return replace(self, pool=pool, scores=scores, positions=positions)

    def view(self, layer: int | Array) -> RawKVs:
        """What an attention kernel takes of a layer."""
        return RawKVs(self.pool, self.tables.block_table[layer], self.lengths[layer])

    def positions_of(self, layer: int | Array) -> Array:
        """``i32[batch, kv_heads, capacity]`` of a layer's KVs, in table order."""
        return in_table_order(self.positions, self.tables.block_table[layer], self.lengths[layer], self.block_size)

    def rows(self, which: Array) -> RawStore:
        """Only these rows of the batch, ``i32[n]``, over the same pool."""
        return replace(self, tables=self.tables.rows(which))

    def with_rows(self, part: RawStore, which: Array) -> RawStore:
        """Rows ``which`` and the pool from ``part``, the other rows from these."""
        return replace(part, tables=self.tables.with_rows(part.tables, which))


def in_table_order(values: Array, block_table: Array, lengths: Array, block_size: int) -> Array:
    """Scores or positions of heads' KVs, ``[..., max_blocks * block_size]``; those past a head's end mean nothing.

    Args:
      values: ``[rows, 128]``, one a token slot.
      block_table: ``i32[..., max_blocks]``, of all layers or of one.
      lengths: ``i32[...]``.
      block_size: slots a block.
    """
    blocks = jnp.where(_holds_blocks(block_table, lengths, block_size), block_table, NULL_BLOCK)
    return slot_values.read_blocks(values, blocks, block_size).reshape(*lengths.shape, -1)


def to_slots(values: Array, block_table: Array, lengths: Array, new: Array) -> Array:
    """Scores or positions with those of the heads' blocks replaced by new, in table order; see ``in_table_order``."""
    new = new.reshape(*block_table.shape, -1)
    return slot_values.write_blocks(values, block_table, new, _holds_blocks(block_table, lengths, new.shape[-1]))


def add_to_slots(
    values: Array, block_table: Array, lengths: Array, gains: Array, up_to: tuple[Array, Array] | None = None
) -> Array:
    """Scores with the gains added of what the heads hold; the cost follows that, not the table's width.

    Args:
      values: ``f32[rows, 128]``, one a token slot.
      block_table: ``i32[batch, kv_heads, max_blocks]``.
      lengths: ``i32[batch, kv_heads]``.
      gains: ``f32[batch, kv_heads, max_blocks * block_size]`` in table order; what is past a length isn't read.
      up_to: positions like ``values``, and ``i32[batch]`` the last position of a KV that gains; None: all do.
    """
    _, kv_heads, max_blocks = block_table.shape
    size = gains.shape[-1] // max_blocks
    gains = jnp.pad(gains, ((0, 0), (0, 0), (0, -gains.shape[-1] % LANES)))
    a_head, gains = gains.shape[-1] // size, gains.reshape(-1, LANES)  # as a TPU's kernel leaves them: it costs nothing
    resident = walk(block_table.reshape(-1, max_blocks), lengths.reshape(-1), size)

    def add(i: Array, values: Array) -> Array:
        part = resident.part(i)
        exists, gain_of = part.segment < max_blocks, part.row * a_head + part.segment
        gain = slot_values.read_blocks(gains, jnp.where(exists, gain_of, 0), size)
        grows = part.held
        if up_to is not None:
            positions, last = up_to
            grows &= slot_values.read_blocks(positions, part.blocks, size) <= last[part.row // kv_heads][:, None]
        old = slot_values.read_blocks(values, part.blocks, size)
        return slot_values.write_blocks(values, part.blocks, old + jnp.where(grows, gain, 0.0), exists)

    return lax.fori_loop(0, resident.steps, add, values)


def _holds_blocks(block_table: Array, lengths: Array, block_size: int) -> Array:
    """``bool`` like the table: which entries are a head's."""
    return jnp.arange(block_table.shape[-1], dtype=jnp.int32) < (-(-lengths // block_size))[..., None]
