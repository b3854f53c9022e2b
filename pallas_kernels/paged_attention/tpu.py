"""Decode attention as a TPU kernel: the blocks of a row (a KV head of a sequence) are streamed tile by tile.

A tile's logits, its softmax and its values wait for one another, and leave the core idle meanwhile. So the product of
the next tile with its query, be it the next row's, is taken before the softmax and the values of this one: the rows of
a grid step are one sequence of tiles, of which two are worked on at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention.tpu_masses import Kept, masses_shape
from pallas_kernels.paged_attention.types import Observe
from pallas_kernels.tpu_tiles import (
    CORES,
    SMEM_ENTRIES,
    UNCHECKED,
    TileStream,
    Tiling,
    held_blocks,
    rows_at_once,
    tiling,
)
from pallas_kernels.tpu_values import LANES, MASKED, check_pool, lanes_of, product


class Results(NamedTuple):
    """Of attention, by row (a KV head of a sequence) but for the output."""

    output: Array
    masses: Array | None
    """``f32[rows, kvs]``, where they are observed; past a row's length they mean nothing."""
    sums: Array | None
    """``f32[rows, group, 128]``, where they are asked for: maximum of the logits and sum in the first two lanes."""


class Tile(NamedTuple):
    """Taken from the stream, and its product with the query, ``[group, kvs]``."""

    row: Array
    number: Array
    slot: Array
    logits: Array


class Running(NamedTuple):
    """The softmax of a row so far: maximum and sum ``[group, 1]``, output ``[group, width]``."""

    maximum: Array
    total: Array
    output: Array


Carry = tuple[Tile, Running, Array, Array]
"""The tile that goes into the softmax next, that softmax, and row and number of the tile after it."""
BUFFERS = 5
"""Two are worked on, three under way."""
ROWS_A_STEP = 32
"""Of the grid. Where a step begins and ends no two tiles overlap, which so many rows share."""


def paged_attention(
    query: Array,
    raw: RawKVs,
    *,
    observe: Observe | None = None,
    tiles: Tiling | None = None,
    smem_entries: int = SMEM_ENTRIES,
    interpret: Any = False,
) -> tuple[Array, Array | None]:
    """See ``api.paged_attention``.

    ``tiles`` and ``smem_entries`` are for tests: how heads are cut, and how large a table one call may take.

    Raises:
      ValueError: a table row too long for SMEM.
    """
    batch, kv_heads, max_blocks = raw.block_table.shape
    tiles = tiles or tiling(raw.pool, max_blocks, buffers=BUFFERS)
    run = partial(attend_rows, raw.pool, observe=observe, tiles=tiles, interpret=interpret)
    out, masses, _ = in_calls(run, query, raw, smem_entries)
    if masses is None:
        return out, None
    return out, masses.reshape(batch, kv_heads, -1)[..., : max_blocks * tiles.block_size]


def check(query: Array, raw: RawKVs) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_pool(raw.pool, query.shape[-1])


def in_calls(run: Callable[..., Results], query: Array, raw: RawKVs, smem_entries: int) -> Results:
    """As many rows a call as SMEM takes; the output is ``[batch, heads, head_dim]``."""
    batch, heads, head_dim = query.shape
    kv_heads, max_blocks = raw.block_table.shape[1:]
    at_once = rows_at_once(max_blocks, smem_entries)
    rows, group = batch * kv_heads, heads // kv_heads
    lanes = lanes_of(raw.pool)

    query = query.reshape(rows, group, head_dim)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, lanes.width - head_dim)))
    arguments = (padded, raw.block_table.reshape(rows, max_blocks), raw.lengths.reshape(rows))
    parts = [run(*(x[at : at + at_once] for x in arguments), scale=head_dim**-0.5) for at in range(0, rows, at_once)]
    out, masses, sums = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    return Results(out[..., lanes.value_at : lanes.value_at + head_dim].reshape(batch, heads, head_dim), masses, sums)


def attend_rows(
    pool: Array,
    query: Array,
    table: Array,
    lengths: Array,
    *,
    scale: float,
    observe: Observe | None = None,
    tiles: Tiling,
    sums: bool = False,
    interpret: Any,
) -> Results:
    """One call: query ``[rows, group, width]`` -> output like it."""
    rows, group, width = query.shape
    steps = -(-rows // (CORES * ROWS_A_STEP))
    at_once = -(-rows // (CORES * steps))
    pad = CORES * steps * at_once - rows
    query = jnp.pad(query, ((0, pad), (0, 0), (0, 0)))
    lengths = jnp.pad(lengths, (0, pad + 1))  # one more row, without KVs, stands for there being no other
    upcoming = jnp.where(lengths > 0, jnp.arange(len(lengths), dtype=jnp.int32), rows + pad)

    def of_rows(*dims: int) -> pl.BlockSpec:
        return pl.BlockSpec((at_once, *dims), lambda core, step, *_: (core * steps + step, 0, 0))

    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    shapes = (  # of ``Results``
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        masses_shape(tiles, rows + pad) if observe else None,
        jax.ShapeDtypeStruct((rows + pad, group, LANES), jnp.float32) if sums else None,
    )
    scratch = TileStream.scratch_shapes(tiles, pool), Kept.scratch_shapes(tiles, group) if observe else None
    room = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(scratch) if x.memory_space == pltpu.VMEM)
    out, masses, row_sums = pl.pallas_call(
        partial(_kernel, scale=scale, observe=observe, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(CORES, steps),
            in_specs=[of_rows(group, width), anywhere],
            out_specs=(of_rows(group, width), anywhere if observe else None, of_rows(group, LANES) if sums else None),
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=16 * 2**20 + 2 * room, **UNCHECKED
        ),
        name="paged_attention",
        interpret=interpret,
    )(lengths, lax.cummin(upcoming, reverse=True), jnp.pad(table, ((0, pad), (0, 0))).reshape(-1), query, pool)
    if masses is not None:
        masses = masses.reshape(rows + pad, -1)
    return jax.tree.map(lambda x: x[:rows], Results(out, masses, row_sums))


def _kernel(
    lengths: Any,
    upcoming: Any,
    table: Any,
    query_ref: Any,
    pool: Any,
    out_ref: Any,
    masses: Any | None,
    sum_ref: Any | None,
    stream_scratch: tuple[Any, Any, Any],
    kept_scratch: tuple[Any, ...] | None,
    *,
    scale: float,
    observe: Observe | None,
    tiles: Tiling,
) -> None:
    """``upcoming``: the first row at or after each that holds a KV."""
    core, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    at_once, group, width = query_ref.shape
    first = (core * steps + step) * at_once
    end = first + at_once

    items = core * steps * at_once, (core + 1) * steps * at_once
    stream = TileStream(tiles, pool, table, held_blocks(lengths, tiles), stream_scratch, items, in_use=2)
    buffer = stream.buffer
    value_at = buffer.shape[-1] - width  # K is the row's first ``width`` lanes, V its last; they may be the same
    kept = Kept(observe, masses, *kept_scratch) if observe and kept_scratch else None

    pl.when(step == 0)(stream.start)
    if kept:
        pl.when(step == 0)(kept.start)

    def left_of(row: Array, number: Array) -> Array:
        """KVs of the row from a tile on."""
        return lengths[row] - number * tiles.kvs

    def product_of(row: Array, number: Array, slot: Array, kvs: int) -> Tile:
        """A tile that was taken: of its first so many KVs, which are all that it has."""
        s = product(query_ref[row - first].astype(buffer.dtype), buffer[slot, :kvs, :width], (1, 1))
        s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 1) < left_of(row, number), s * scale, MASKED)
        if kvs < tiles.kvs:
            s = jnp.concatenate([s, jnp.full((group, tiles.kvs - kvs), MASKED)], axis=1)
        return Tile(row, number, slot, s)

    def following(tile: Tile) -> tuple[Array, Array]:
        """Row and number of the tile after this one."""
        is_last = left_of(tile.row, tile.number) <= tiles.kvs
        return jnp.where(is_last, upcoming[tile.row + 1], tile.row), jnp.where(is_last, 0, tile.number + 1)

    def add(tile: Tile, kvs: int, running: Running) -> Running:
        """Its first so many KVs into the softmax of its row."""
        s = tile.logits[:, :kvs]
        maximum, total, output = (  # another row's tell nothing of this one
            jnp.where(tile.number == 0, none, x) for none, x in zip((MASKED, 0.0, 0.0), running, strict=True)
        )
        new_maximum = jnp.maximum(maximum, s.max(-1, keepdims=True))
        p = jnp.exp(s - new_maximum)
        decay = jnp.exp(maximum - new_maximum)
        out = product(p.astype(buffer.dtype), buffer[tile.slot, :kvs, value_at:], (1, 0))
        running = Running(new_maximum, total * decay + p.sum(-1, keepdims=True), output * decay + out)
        share = 1.0 / running.total
        out_ref[tile.row - first] = (running.output * share).astype(out_ref.dtype)  # what the last tile leaves stands
        if sum_ref is not None:
            lane = lax.broadcasted_iota(jnp.int32, sum_ref.shape[1:], 1)
            sum_ref[tile.row - first] = jnp.where(lane == 0, new_maximum, running.total)
        if kept:
            kept.keep(tile.number, tile.logits)
            is_last = left_of(tile.row, tile.number) <= tiles.kvs
            pl.when(is_last)(partial(kept.store, tile.row, tile.number + 1, new_maximum, share))
        return running

    def attend(kvs: int, carry: Carry) -> Carry:
        tile, running, row, number = carry
        slot = stream.take(row, number)
        stream.clear_past(tile.slot, left_of(tile.row, tile.number), kvs, value_at)
        next_tile = product_of(row, number, slot, kvs)
        return next_tile, add(tile, kvs, running), *following(next_tile)

    def turn(carry: Carry) -> Carry:
        """Tiles as long as they, with the next, are worked on in one size, in each of the sizes once."""

        def is_between(low: int, high: int, carry: Carry) -> Array:
            tile, _, row, number = carry
            held = jnp.minimum(jnp.maximum(left_of(tile.row, tile.number), left_of(row, number)), tiles.kvs)
            return (row < end) & (held > low) & (held <= high)

        for low, high in itertools.pairwise((0, *parts, tiles.kvs)):
            carry = lax.while_loop(partial(is_between, low, high), partial(attend, high), carry)
        return carry

    parts = [size for size in (tiles.kvs // 4, tiles.kvs // 2) if size % LANES == 0]
    out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)  # of a row without KVs
    if sum_ref is not None:
        lane = lax.broadcasted_iota(jnp.int32, sum_ref.shape, 2)
        sum_ref[...] = jnp.where(lane == 0, MASKED, 0.0)
    start = upcoming[first]

    @pl.when(start < end)
    def _():
        zero = jnp.int32(0)
        tile = product_of(start, zero, stream.take(start, zero), tiles.kvs)
        none = Running(jnp.full((group, 1), MASKED), jnp.zeros((group, 1)), jnp.zeros((group, width)))
        last, running, _, _ = lax.while_loop(lambda carry: carry[2] < end, turn, (tile, none, *following(tile)))
        stream.clear_past(last.slot, left_of(last.row, last.number), tiles.kvs, value_at)
        add(last, tiles.kvs, running)

    if kept:
        pl.when(step == steps - 1)(kept.end)
