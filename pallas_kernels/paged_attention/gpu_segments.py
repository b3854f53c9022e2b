"""What the programs of decode attention on a GPU take: segments of rows, streamed through shared memory tile by tile.

A row is one KV head of one sequence. All segments have about equal length, so the longest head doesn't set the time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SEGMENTS = 2048
"""Segments to aim at: some eight programs for each that a large GPU runs at once, so that the last ones cost little."""
MIN_TILES = 2
"""Tiles of a segment at least; shorter ones would write more partial results than they read KVs."""
TILE_BYTES = 32 * 1024
STAGES = 3
"""Tiles in shared memory, all but one of them on their way: 96 KiB, so two programs fit a multiprocessor."""

Carry = TypeVar("Carry")


class Work(NamedTuple):
    """Which part of which row each program takes; a program past the last segment has no tiles."""

    end: Array
    """``i32[rows]``: the segment after each row's last; rows without KVs have none."""
    table: Array
    """``i32[segments, 4]``: row, first tile, tiles, KVs of the row."""


def plan_work(lengths: Array, max_kvs: int, tile: int, least: int = MIN_TILES) -> Work:
    """Segments of equal numbers of tiles, at least so many, for ``i32[rows]`` KVs a row."""
    rows = lengths.shape[0]
    tiles = -(-lengths // tile)
    each = jnp.maximum(least, -(-jnp.sum(tiles) // SEGMENTS))
    end = jnp.cumsum(-(-tiles // each))
    most = rows * -(-max_kvs // (tile * least))
    segment = jnp.arange(min(SEGMENTS + rows, most))
    row = jnp.sum(segment[:, None] >= end[None, :], axis=1)
    of = jnp.minimum(row, rows - 1)
    first = (segment - jnp.where(of > 0, end[of - 1], 0)) * each
    count = jnp.where(row < rows, jnp.minimum(each, tiles[of] - first), 0)
    return Work(end.astype(jnp.int32), jnp.stack([of, first, count, lengths[of]], axis=1).astype(jnp.int32))


class Segment(NamedTuple):
    """A program's own line of the work, and where its KVs come from and go to."""

    row: Array
    first: Array  # tile of the row
    tiles: Array
    length: Array  # KVs of the row
    pool_ref: Any  # [blocks, block_size, 2 * half]
    table_ref: Any  # i32[rows, max_blocks]
    kv_smem: Any  # [STAGES, tile, 2 * half]
    arrived: Any  # barriers of ``copies`` arrivals

    @classmethod
    def of_program(cls, work_ref: Any, *refs: Any) -> "Segment":
        segment = lax.axis_index("segment")
        return cls(*(work_ref[segment, i] for i in range(4)), *refs)

    def begin(self) -> None:
        """Starts the copies of the first tiles."""
        ahead = [self._blocks(jnp.int32(k)) for k in range(STAGES)]
        for k, blocks in enumerate(ahead):
            pl.when(k < self.tiles)(lambda k=k, blocks=blocks: self._fetch(jnp.int32(k), blocks))

    def stream(self, attend: Callable[[Array, Array, Carry], Carry], carry: Carry) -> Carry:
        """``attend(start, slot, carry)`` over the tiles: ``start`` is a tile's first KV, ``slot`` its stage."""
        tile = self.kv_smem.shape[1]

        def step(k: Array, carry: Carry) -> Carry:
            slot = lax.rem(k, jnp.int32(STAGES))
            blocks = self._blocks(k + STAGES)  # looked up while the tile is on its way
            plgpu.barrier_wait(self.arrived.at[slot])
            carry = attend((self.first + k) * tile, slot, carry)
            pl.when(k + STAGES < self.tiles)(lambda: self._fetch(k + STAGES, blocks))
            return carry

        return lax.fori_loop(0, self.tiles, step, carry)

    def _starts(self, k: Array) -> list[Array]:
        """The first KV of each copy of the ``k``-th tile."""
        tile = self.kv_smem.shape[1]
        pieces = copies(tile, self.pool_ref.shape[1])
        return [(self.first + k) * tile + i * (tile // pieces) for i in range(pieces)]

    def _blocks(self, k: Array) -> list[Array]:
        """Where the ``k``-th tile lies: the block of each copy, whether there is such a tile or not."""
        blocks = []
        for start in self._starts(k):
            # A slot past the head's end gets the null block: something must arrive, and it stays in the L2 cache.
            held = start < self.length
            column = jnp.where(held, lax.div(start, jnp.int32(self.pool_ref.shape[1])), 0)
            blocks.append(jnp.where(held, self.table_ref[self.row, column], 0))
        return blocks

    def _fetch(self, k: Array, blocks: list[Array]) -> None:
        """Starts the copies of the ``k``-th tile."""
        block_size, slot = self.pool_ref.shape[1], lax.rem(k, jnp.int32(STAGES))
        piece = self.kv_smem.shape[1] // len(blocks)
        for i, (start, block) in enumerate(zip(self._starts(k), blocks, strict=True)):
            inside = pl.ds(lax.rem(start, jnp.int32(block_size)), piece)
            target = self.kv_smem.at[slot, pl.ds(i * piece, piece)]
            plgpu.copy_gmem_to_smem(self.pool_ref.at[block, inside], target, self.arrived.at[slot])


def copies(tile: int, block_size: int) -> int:
    """Copies that bring a tile: none of them more than a block."""
    return max(1, tile // block_size)
