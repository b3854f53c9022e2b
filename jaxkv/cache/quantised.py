"""The quantised part of a cache: blocks of two precisions from one free list, for every KV head of every layer.

A head's table row holds its high-tier blocks from the left and its low-tier blocks from the right (LeanKV, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkv.cache.free_list import FreeList
from pallas_kernels.paged_attention import Weakest
from pallas_kernels.quantised_block import BlockLayout

HIGH, LOW = 0, 1


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """Sizes of the quantised part. ``num_blocks`` counts the null block."""

    layout: BlockLayout
    num_blocks: int

    def max_blocks(self, max_context: int) -> int:
        """Columns of a table row: enough for every KV in the high tier, and a part-filled block of each."""
        return -(-max_context // self.layout.tokens) + 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tiers:
    """Donated with the cache that it is a part of. Axes: layer, sequence, KV head, tier (high, low)."""

    pool: Array
    """``u32[blocks, rows, 128]``: blocks of ``layout``."""
    block_table: Array
    """``i32[layers, batch, kv_heads, max_blocks]``."""
    lengths: Array
    """``i32[layers, batch, kv_heads, 2]``: KVs in each tier."""
    weakest: Weakest
    """``[layers, batch, kv_heads, 2]``: the KV that the next decode step would give up first."""
    free: FreeList
    layout: BlockLayout = field(metadata={"static": True})

    @property
    def tokens(self) -> np.ndarray:
        """``i32[2]``: KVs that a block of each tier holds."""
        return np.array([tier.tokens for tier in self.layout.tiers], np.int32)

    def blocks_held(self) -> Array:
        """``i32[layers, batch, kv_heads, 2]``."""
        return num_blocks(self.lengths, self.tokens)

    @property
    def row_bytes(self) -> int:
        """Bytes of a sequence's table row, with what else there is of each head."""
        layers, _, kv_heads, width = self.block_table.shape
        return 4 * layers * kv_heads * (width + 6)  # two lengths, and values and indices of the weakest

    def take(self, sequences: Array) -> Tiers:
        """Only these rows of the batch, ``i32[n]``, over the same pool."""
        rows = jax.tree.map(lambda x: x[:, sequences], self._rows())
        return replace(self, **rows)

    def put(self, part: Tiers, sequences: Array) -> Tiers:
        """Rows ``sequences`` and the pool from ``part``, the other rows from these."""
        rows = jax.tree.map(lambda x, new: x.at[:, sequences].set(new), self._rows(), part._rows())
        return replace(part, **rows)

    def _rows(self) -> dict[str, Any]:
        return {"block_table": self.block_table, "lengths": self.lengths, "weakest": self.weakest}


def init_tiers(config: TierConfig, *, layers: int, batch: int, kv_heads: int, max_context: int) -> Tiers:
    """Empty tiers."""
    heads = (layers, batch, kv_heads)
    return Tiers(
        pool=jnp.zeros((config.num_blocks, config.layout.rows, 128), jnp.uint32),
        block_table=jnp.zeros((*heads, config.max_blocks(max_context)), jnp.int32),
        lengths=jnp.zeros((*heads, 2), jnp.int32),
        weakest=Weakest(value=jnp.full((*heads, 2), jnp.inf), index=jnp.zeros((*heads, 2), jnp.int32)),
        free=FreeList.of(config.num_blocks),
        layout=config.layout,
    )


def num_blocks(lengths: Array, tokens: np.ndarray) -> Array:
    """Blocks of each tier, ``i32[..., 2]``, that so many KVs fill."""
    return -(-lengths // tokens)


def columns(tier: Array | int, index: Array, max_blocks: int) -> Array:
    """Where a tier's ``index``-th block stands in a table row."""
    return jnp.where(jnp.asarray(tier) == HIGH, index, max_blocks - 1 - index)


def has_room(tiers: Tiers, lengths: Array) -> Array:
    """``bool[]``: whether ``grow`` can give each head and tier ``lengths`` KVs."""
    want = num_blocks(lengths, tiers.tokens)
    enough = jnp.sum(want - tiers.blocks_held()) <= tiers.free.count
    return enough & jnp.all(want.sum(-1) <= tiers.block_table.shape[-1])


def grow(tiers: Tiers, lengths: Array, *, most: int) -> tuple[Tiers, Array]:
    """Gives each head and tier the blocks for ``lengths`` KVs, ``i32[layers, batch, kv_heads, 2]``, all or none.

    Args:
      tiers: the tiers.
      lengths: none shorter than present.
      most: bound on the blocks that a head's tier grows by; static.

    Returns:
      The tiers with the new blocks and lengths and ``bool[]`` granted. Where too few blocks are free, or a table row
      is too short, nothing changes and granted is False.
    """
    have, want = tiers.blocks_held(), num_blocks(lengths, tiers.tokens)
    width = tiers.block_table.shape[-1]
    granted = has_room(tiers, lengths)
    need = jnp.where(granted, want - have, 0)
    free, blocks, real = tiers.free.pop(need, most)
    column = columns(jnp.arange(2)[:, None], have[..., None] + jnp.arange(most), width)
    column = jnp.where(real, column, width)
    layer, sequence, head, _, _ = jnp.ogrid[tuple(slice(n) for n in (*have.shape, 1))]
    table = tiers.block_table.at[layer, sequence, head, column].set(blocks, mode="drop")
    lengths = jnp.where(granted, lengths, tiers.lengths)
    return replace(tiers, block_table=table, lengths=lengths, free=free), granted


def release(tiers: Tiers, finished: Array) -> Tiers:
    """Empties what ``bool[layers, batch, kv_heads]`` (or broadcastable) marks, and takes its blocks back."""
    held = tiers.blocks_held()
    finished = jnp.broadcast_to(finished, held.shape[:-1])[..., None]
    place = jnp.arange(tiers.block_table.shape[-1])
    taken = (place < held[..., :1]) | (place >= place.size - held[..., 1:])
    return replace(
        tiers,
        lengths=jnp.where(finished, 0, tiers.lengths),
        weakest=Weakest(value=jnp.where(finished, jnp.inf, tiers.weakest.value), index=tiers.weakest.index),
        free=tiers.free.push(tiers.block_table, taken & finished),
    )


def slots_of(tiers: Tiers, tier: int, index: Array) -> tuple[Array, Array]:
    """Block and offset of each head's ``index``-th KV of a tier, ``i32[layers, batch, kv_heads]``."""
    tokens = tiers.layout.tiers[tier].tokens
    column = columns(tier, index // tokens, tiers.block_table.shape[-1])
    column = jnp.clip(column, 0, tiers.block_table.shape[-1] - 1)
    return jnp.take_along_axis(tiers.block_table, column[..., None], axis=-1)[..., 0], index % tokens
