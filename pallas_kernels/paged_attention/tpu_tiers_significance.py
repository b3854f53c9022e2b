"""What attention tells of the quantised KVs, in a TPU kernel: with the softmax known, each tile kept from it is gone
over again; scores grow and go back to the pool, and the weakest KV is found.

A copy takes whole tiles of 8 rows: those in which a block's scores and positions are (its tail) are kept and written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu_tiers_softmax import BlockStream, KVs, Softmax
from pallas_kernels.paged_attention.types import Significance
from pallas_kernels.quantised_block import BlockLayout
from pallas_kernels.quantised_block.layout import LANES, Segments
from pallas_kernels.quantised_block.tpu_vectors import SUBLANES, lay, line
from pallas_kernels.tpu_tiles import Tiling
from pallas_kernels.tpu_values import ceil_div, floor_div

NOWHERE = jnp.iinfo(jnp.int32).max


def tail(tier: Segments) -> tuple[int, int]:
    """The rows, first and end, of a block's tail."""
    return tier.scores // (LANES * SUBLANES) * SUBLANES, -(-tier.end // (LANES * SUBLANES)) * SUBLANES


class Least(NamedTuple):
    """Value and place of the KV that is worth least, ``[1, 1, 1]`` each; or where they go."""

    value: Any
    place: Any


class Kept:
    """Inside a kernel: logits and tails of a row's tiles, and the copies by which the tails go back.

    Tails are in one of two buffers in turn, so that the copies of one row are under way during the next.
    """

    def __init__(self, stream: BlockStream, written: Any, scratch: Any, row: Array, step: Array):
        """
        Args:
          stream: of the blocks.
          written: the pool; the same memory as the stream's.
          scratch: what ``scratch_shapes`` asked for.
          row: the row that the grid visits.
          step: how many this core has visited before.
        """
        self.stream, self.written, self.row, self.turn = stream, written, row, lax.rem(step, jnp.int32(2))
        self.logits, self.tails, self.wrote, self.count = scratch

    @staticmethod
    def scratch_shapes(tiles: Tiling, layout: BlockLayout, group: int) -> tuple[Any, ...]:
        """Logits, tails, semaphores of the copies and how many are under way of each tier."""
        rows = max(end - first for first, end in map(tail, layout.tiers))
        tokens = max(tier.tokens for tier in layout.tiers) // layout.sides
        return (
            pltpu.VMEM((tiles.tiles + 1, layout.sides, tiles.blocks, group, -(-tokens // LANES) * LANES), jnp.float32),
            pltpu.VMEM((2, tiles.tiles + 1, tiles.blocks, rows, LANES), jnp.uint32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SMEM((2, 2), jnp.int32),
        )

    def keep(self, kvs: KVs, before: Array, tile: Array, slot: Array, blocks: range, logits: list[Array]) -> None:
        """Some blocks' of a tile; ``before``: tiles of the row that were kept before its tier's."""
        tokens = logits[0].shape[1] // len(blocks)
        first, end = tail(kvs.tier)
        for side, s in enumerate(logits):
            for k, block in enumerate(blocks):
                self.logits[before + tile, side, block, :, :tokens] = s[:, k * tokens : (k + 1) * tokens]
        here = slice(blocks.start, blocks.stop)
        self.tails[self.turn, before + tile, here, : end - first] = self.stream.buffer[slot, here, first:end]

    def observe(
        self,
        kvs: KVs,
        before: Array,
        softmax: Softmax,
        significance: Significance,
        next_position: Array,
        group: int,
    ) -> Least:
        """Adds to a tier's scores, starts to write them, and finds its weakest KV."""
        tier, per_tile = kvs.tier, self.stream.tiling.blocks
        at_once = per_tile // 4 or per_tile
        first, end = tail(tier)
        a_side = tier.tokens // tier.sides
        share = 1.0 / jnp.maximum(softmax.total, jnp.finfo(jnp.float32).tiny)
        following = jnp.full((1, 1, 1), next_position, jnp.int32)

        def over(step: Array, weakest: Least) -> Least:
            tile = floor_div(step * at_once, per_tile)
            at, block = before + tile, step * at_once - tile * per_tile
            here = pl.ds(block, at_once)
            rows = self.tails[self.turn, at, here, : end - first]
            for side in range(tier.sides):
                places = kvs.places(step, (at_once, 1, a_side), at_once, side)
                held = kvs.held(places)
                p = jnp.exp(self.logits[at, side, here, :, :a_side] - softmax.maximum) * share
                p = jnp.where(held, p, 0.0)
                start = tier.scores - first * LANES + side * a_side
                scores = lax.bitcast_convert_type(line(rows, start, a_side), jnp.float32)
                positions = lax.bitcast_convert_type(line(rows, start + tier.tokens, a_side), jnp.int32)
                scores += significance.observe(p[:, None, :group])
                worth = jnp.where(held, significance.value(scores, positions, following), jnp.inf)
                weakest = _weaker(weakest, worth, places)
                rows = lay(rows, start, lax.bitcast_convert_type(scores, jnp.uint32))
            self.tails[self.turn, at, here, : end - first] = rows
            self._write(kvs, step * at_once, at_once, at, block)
            return weakest

        shape = 1, 1, a_side  # lanes meet at the end alone
        nothing = Least(jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, NOWHERE, jnp.int32))
        self.count[self.turn, int(kvs.is_low)] = kvs.blocks
        weakest = lax.fori_loop(0, ceil_div(kvs.blocks, at_once), over, nothing)
        value = weakest.value.min(2, keepdims=True)
        return Least(value, jnp.where(weakest.value == value, weakest.place, NOWHERE).min(2, keepdims=True))

    def start(self) -> None:
        """Before a core's first row."""
        for turn in range(2):
            for tier in range(2):
                self.count[turn, tier] = 0

    def finish(self, tiers: tuple[Segments, Segments], turn: Array) -> None:
        """Waits until a buffer of tails is written."""
        for index, tier in enumerate(tiers):
            first, end = tail(tier)
            rows = self.tails.at[turn, 0, 0, pl.ds(0, end - first)]

            def wait(_: Array, __: None, rows: Any = rows) -> None:
                pltpu.make_async_copy(rows, rows, self.wrote.at[turn]).wait()

            lax.fori_loop(0, self.count[turn, index], wait, None)

    def _write(self, kvs: KVs, first: Array, most: int, at: Array, place: Array) -> None:
        """Starts to write tails of the item's blocks from a first on, kept from a place of a tile on."""
        start, end = tail(kvs.tier)
        origin = self.row * self.stream.tiling.max_blocks + self.stream.span(kvs.item)[0] + first

        def copy(index: Array, _: None) -> None:
            block = self.written.at[self.stream.table[origin + index], pl.ds(start, end - start)]
            source = self.tails.at[self.turn, at, place + index, pl.ds(0, end - start)]
            pltpu.make_async_copy(source, block, self.wrote.at[self.turn]).start()

        left = kvs.blocks - first

        @pl.when(left >= most)
        def _():
            for index in range(most):
                copy(jnp.int32(index), None)

        @pl.when(left < most)
        def _():
            lax.fori_loop(0, left, copy, None)


def _weaker(weakest: Least, worth: Array, places: Array) -> Least:
    """In each lane the weaker one, of equals the first."""
    value = worth.min(0, keepdims=True)
    here = jnp.where(worth == value, places, NOWHERE).min(0, keepdims=True)
    place = jnp.where(value == weakest.value, jnp.minimum(here, weakest.place), here)
    place = jnp.where(value <= weakest.value, place, weakest.place)
    return Least(jnp.minimum(value, weakest.value), place)
