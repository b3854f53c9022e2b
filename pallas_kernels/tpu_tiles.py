"""Tiles of a head's blocks, streamed from the pool into a ring of VMEM buffers while earlier ones are worked on.

The blocks of a head are cut into tiles of ``Tiling.blocks`` table entries. One stream runs over all heads of a kernel's
grid in order, so the next head's first tiles are under way while the last of this one are in use. A copy moves one
block: that is all the table promises to be contiguous.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_values import LANES, ceil_div, floor_div

TILE_BYTES = 512 * 1024
"""So much work a tile that the matrix unit's and the reductions' latency counts for little."""
BUFFERS = 4
"""So 1.5 MiB are in flight: about what bandwidth times latency asks for."""
UNROLLED = 32
"""Copies at most that are started without asking whether there are more."""
CORES = 2
"""Halves of a grid, which the two cores of a v4 or v5p share; on other chips they follow each other."""
SMEM_ENTRIES = 128 * 1024
"""i32 that a call may prefetch; SMEM is 1 MiB on every generation, of which this is half."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a head's blocks are cut."""

    block_size: int
    blocks: int
    """Table entries a tile."""
    max_blocks: int
    """Table entries a head."""
    buffers: int = BUFFERS

    @property
    def kvs(self) -> int:
        return self.blocks * self.block_size

    @property
    def tiles(self) -> int:
        """Tiles that a whole table row makes."""
        return -(-self.max_blocks // self.blocks)


def tiling(pool: jax.Array, max_blocks: int, *, kvs: int | None = None, buffers: int = BUFFERS) -> Tiling:
    """Tiles of so many KVs, a multiple of 128, or of about ``TILE_BYTES``; of fewer where a table row is shorter."""
    block_size, width = pool.shape[1:]
    if kvs is None:
        kvs = max(LANES, TILE_BYTES // (width * pool.dtype.itemsize) // LANES * LANES)
    whole = -(-max_blocks * block_size // LANES) * LANES
    return Tiling(block_size=block_size, blocks=min(kvs, whole) // block_size, max_blocks=max_blocks, buffers=buffers)


def rows_at_once(entries_a_row: int, smem_entries: int) -> int:
    """Rows that one call may take, so that what it prefetches fits in SMEM; more are split over several calls.

    Raises:
      ValueError: one row alone doesn't fit.
    """
    if entries_a_row > smem_entries:
        raise ValueError(
            f"a head's table row must fit in SMEM: it takes {entries_a_row} entries of {smem_entries}; "
            "use larger blocks or a shorter max_context"
        )
    return smem_entries // entries_a_row


def held_blocks(lengths: Any, tiling: Tiling, repeats: int = 1) -> Callable[[Array], tuple[Array, Array]]:
    """The span of a ``TileStream`` that reads all that a row holds."""
    return lambda item: (jnp.int32(0), ceil_div(lengths[floor_div(item, repeats)], tiling.block_size))


# What a table names is a block of the pool, so copies are started without a check, which takes two thirds of the
# instructions that starting one takes. The interpreter, in which the tests run, does check.
UNCHECKED: dict[str, Any] = {"disable_bounds_checks": True}


class TileStream:
    """Inside a kernel: tiles of all heads in the order in which the grid visits them.

    ``start`` once before the first, then ``take`` once for each tile of each head in turn.
    """

    def __init__(
        self,
        tiling: Tiling,
        pool: Any,
        table: Any,
        span: Callable[[Array], tuple[Array, Array]],
        scratch: tuple[Any, Any, Any],
        items: tuple[Array | int, Array | int],
        *,
        repeats: int = 1,
        in_use: int = 1,
    ):
        """
        Args:
          tiling: how heads are cut.
          pool: ``[blocks, block_size, width]`` in HBM.
          table: ``i32[rows * max_blocks]`` in SMEM.
          span: the table entries ``[first, end)`` of its row that an item is to read.
          scratch: what ``scratch_shapes`` asked for.
          items: first and end of what the grid visits; item ``i`` is row ``i // repeats``.
          repeats: how many times in turn a row is visited.
          in_use: tiles that are worked on at once: a buffer is filled anew when so many have been taken after its tile.
        """
        self.tiling, self.pool, self.table, self.span, self.repeats = tiling, pool, table, span, repeats
        self.buffer, self.arrived, self.state = scratch
        self.items, self.in_use = items, in_use

    @staticmethod
    def scratch_shapes(tiling: Tiling, pool: Array) -> tuple[Any, Any, Any]:
        """Buffers, their semaphores, and the item, tile and buffer to copy next, and the buffer to take next."""
        return (
            pltpu.VMEM((tiling.buffers, tiling.kvs, pool.shape[-1]), pool.dtype),
            pltpu.SemaphoreType.DMA((tiling.buffers,)),
            pltpu.SMEM((4,), jnp.int32),
        )

    def tiles(self, item: Array) -> tuple[Array, Array]:
        """First and end of an item's tiles."""
        first, end = self.span(item)
        return floor_div(first, self.tiling.blocks), jnp.where(end > first, ceil_div(end, self.tiling.blocks), 0)

    def start(self) -> None:
        """Begins to copy as many tiles as there are buffers, but for those in use at once."""
        self._go_to(jnp.int32(self.items[0]))
        self.state[2] = self.state[3] = 0
        lax.fori_loop(0, self.tiling.buffers - self.in_use, lambda _, __: self._copy_next(), None)

    def take(self, item: Array, tile: Array) -> Array:
        """Waits for the next tile, which is this one, and returns its buffer; one is given up: see ``in_use``."""
        self._copy_next()
        slot = self.state[3]
        self.state[3] = self._after(slot)
        self._wait(item, tile, slot)
        return slot

    def clear_past(self, slot: Array, left: Array, kvs: int, lane: int) -> None:
        """Zeroes rows ``left`` to ``kvs`` of a taken tile from a lane on.

        A freed block keeps its old bytes, and 0 * NaN is NaN: the values of what is no KV must be zero.
        """
        piece, width = math.gcd(kvs, LANES), self.buffer.shape[-1] - lane

        def at(index: Array) -> Any:
            return self.buffer.at[slot, pl.ds(pl.multiple_of(index * piece, piece), piece), pl.ds(lane, width)]

        def clear(index: Array, _: None) -> None:
            at(index)[...] = jnp.zeros((piece, width), self.buffer.dtype)

        @pl.when(left < kvs)
        def _():
            last = floor_div(left, piece)  # only this piece need be read
            held = lax.broadcasted_iota(jnp.int32, (piece, width), 0) < left - last * piece
            at(last)[...] = jnp.where(held, at(last)[...].astype(jnp.float32), 0.0).astype(self.buffer.dtype)
            lax.fori_loop(last + 1, kvs // piece, clear, None)

    def _go_to(self, item: Array) -> None:
        """Points to the first tile of the first item from this one on that has any."""

        def within(item: Array) -> Array:  # past the end there is nothing to read
            return jnp.minimum(item, self.items[1] - 1)

        def is_empty(item: Array) -> Array:
            first, end = self.span(within(item))
            return (item < self.items[1]) & (end <= first)

        item = lax.while_loop(is_empty, lambda i: i + 1, item)
        self.state[0], self.state[1] = item, self.tiles(within(item))[0]

    def _after(self, slot: Array) -> Array:
        return jnp.where(slot == self.tiling.buffers - 1, 0, slot + 1)

    def _entries(self, item: Array, tile: Array) -> tuple[Array, Array]:
        """The table entries of a tile that are in the item's span."""
        first, end = self.span(item)
        return jnp.maximum(first, tile * self.tiling.blocks), jnp.minimum(end, (tile + 1) * self.tiling.blocks)

    def _origin(self, item: Array, tile: Array) -> Array:
        """The table entry whose block comes first in a tile's buffer."""
        return tile * self.tiling.blocks

    def _block(self, slot: Array, index: Array) -> Any:
        """Where in a buffer a block goes."""
        size = self.tiling.block_size
        return self.buffer.at[slot, pl.ds(pl.multiple_of(index * size, size), size)]

    def _copy_next(self) -> None:
        @pl.when(self.state[0] < self.items[1])
        def _():
            item, tile, slot = (self.state[i] for i in range(3))
            row = floor_div(item, self.repeats) * self.tiling.max_blocks
            (first, end), origin = self._entries(item, tile), self._origin(item, tile)
            at_once = next(n for n in range(UNROLLED, 0, -1) if self.tiling.blocks % n == 0)

            def copy(entry: Array) -> None:
                block = self.pool.at[self.table[row + entry]]
                pltpu.make_async_copy(block, self._block(slot, entry - origin), self.arrived.at[slot]).start()

            def copy_some(part: Array, _: None) -> None:
                for i in range(at_once):
                    copy(origin + part * at_once + i)

            lax.cond(
                end - first == self.tiling.blocks,
                lambda: lax.fori_loop(0, self.tiling.blocks // at_once, copy_some, None),
                lambda: lax.fori_loop(first, end, lambda entry, _: copy(entry), None),
            )
            self.state[1], self.state[2] = tile + 1, self._after(slot)
            pl.when(tile + 1 == self.tiles(item)[1])(lambda: self._go_to(item + 1))

    def _wait(self, item: Array, tile: Array, slot: Array) -> None:
        """One wait for the bytes of a whole tile; a part-filled one waits for each block."""
        first, end = self._entries(item, tile)

        def wait_for(part: Any) -> None:
            pltpu.make_async_copy(part, part, self.arrived.at[slot]).wait()

        lax.cond(
            end - first == self.tiling.blocks,
            lambda: wait_for(self.buffer.at[slot]),
            lambda: lax.fori_loop(first, end, lambda _, __: wait_for(self._block(slot, jnp.int32(0))), None),
        )
