"""Survivors into the holes as a TPU kernel: whole tiles of blocks come in, a matrix of ones puts the rows in place.

The ``m``-th source of a head goes to its ``m``-th hole, and both are numbered in table order, so source tiles and hole
tiles are walked like two sorted lists. For each pair that shares numbers, ``ones[source, hole]`` marks the moves: its
product with the source tile is exact, since each row has a single one, and no row is ever copied on its own. Scores and
positions go the same way in integers, in table order, and are put back in their slots a block at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import slot_values
from pallas_kernels.block_moves.types import Moves
from pallas_kernels.tpu_tiles import CORES, SMEM_ENTRIES, UNCHECKED, TileStream, Tiling, rows_at_once, tiling
from pallas_kernels.tpu_values import as_column, check_pool, product

TILE_KVS = 256
BUFFERS = 8
STAGES = 2
"""Rebuilt tiles on their way back to the pool."""
NO_SOURCE, NO_HOLE = -1, -2


class Spread(NamedTuple):
    """How far a row's sources, or its holes, are spread; flat, as a kernel prefetches it."""

    span: Any
    """``i32[rows * 2]``: first and end of the blocks from the first mark to the last."""
    before: Any
    """``i32[rows * (tiles + 1)]``: how many are marked before each tile, and in all."""


class Marked(NamedTuple):
    """The sources, or the holes, of each row, numbered in order."""

    number: Array
    """``i32[rows, tiles, tile kvs]``."""
    spread: Spread
    blocks: Array
    """``bool[rows, max_blocks]``: which hold a mark."""


class Values(NamedTuple):
    """Scores, as their bits, and positions in table order, ``i32[rows, tiles, tile kvs]`` each."""

    scores: Any
    positions: Any


class Stages(NamedTuple):
    """Rebuilt tiles on their way back to the pool, in a kernel."""

    tiles: Any
    """``[STAGES, tile kvs, width]``."""
    stored: Any
    """A semaphore each."""
    state: Any
    """``i32[STAGES + 1]``: blocks under way from each, then the stage that is next."""


def move_kvs(
    pool: Array,
    scores: Array,
    positions: Array,
    block_table: Array,
    moves: Moves,
    *,
    tiles: Tiling | None = None,
    smem_entries: int = SMEM_ENTRIES,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """See ``api.move_kvs``; ``tiles`` and ``smem_entries`` are for tests."""
    rows, max_blocks = block_table.shape
    tiles = tiles or tiling(pool, max_blocks, kvs=TILE_KVS, buffers=BUFFERS)
    at_once = rows_at_once(max_blocks + 2 * tiles.tiles + 6, smem_entries)
    for at in range(0, rows, at_once):
        part = slice(at, at + at_once)
        pool, scores, positions = _run(
            pool, scores, positions, block_table[part], moves.is_source[part], moves.is_hole[part], tiles, interpret
        )
    return pool, scores, positions


def check(pool: Array) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_pool(pool, pool.shape[-1] // 2)


def _run(
    pool: Array,
    scores: Array,
    positions: Array,
    table: Array,
    is_source: Array,
    is_hole: Array,
    tiles: Tiling,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """One call: table ``i32[rows, max_blocks]``, marks ``bool[rows, kvs]``."""
    steps = -(-len(table) // CORES)
    table, is_source, is_hole = (  # of an odd number of rows the last moves nothing
        jnp.pad(x, ((0, CORES * steps - len(x)), (0, 0))) for x in (table, is_source, is_hole)
    )
    rows, max_blocks = table.shape
    size = tiles.block_size
    sources, holes = _marked(is_source, NO_SOURCE, tiles), _marked(is_hole, NO_HOLE, tiles)
    known = jnp.where(sources.blocks | holes.blocks, table, 0)
    old = [slot_values.read_blocks(values, known, size) for values in (scores, positions)]
    old = Values(*(_in_tiles(lax.bitcast_convert_type(x, jnp.int32).reshape(rows, -1), 0, tiles) for x in old))

    in_vmem = pl.BlockSpec((1, tiles.tiles, tiles.kvs), lambda core, step, *_: (core * steps + step, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    values = jax.ShapeDtypeStruct((rows, tiles.tiles, tiles.kvs), jnp.int32)
    width = pool.shape[-1]
    scalars = table.reshape(-1), sources.spread, holes.spread
    inputs = sources.number, holes.number, old
    pool, new = pl.pallas_call(
        partial(_kernel, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(CORES, steps),
            in_specs=(*jax.tree.map(lambda _: in_vmem, inputs), anywhere),
            out_specs=(anywhere, Values(in_vmem, in_vmem)),
            scratch_shapes=(
                TileStream.scratch_shapes(tiles, pool),
                TileStream.scratch_shapes(tiles, pool),
                pltpu.VMEM((tiles.kvs, width), jnp.float32),
                Stages(
                    pltpu.VMEM((STAGES, tiles.kvs, width), pool.dtype),
                    pltpu.SemaphoreType.DMA((STAGES,)),
                    pltpu.SMEM((STAGES + 1,), jnp.int32),
                ),
            ),
        ),
        out_shape=(jax.ShapeDtypeStruct(pool.shape, pool.dtype), Values(values, values)),
        input_output_aliases={len(jax.tree.leaves((scalars, inputs))): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=32 * 2**20, **UNCHECKED
        ),
        name="move_kvs",
        interpret=interpret,
    )(*scalars, *inputs, pool)

    def put_back(values: Array, new: Array) -> Array:
        new = new.reshape(rows, -1)[:, : max_blocks * size].reshape(rows, max_blocks, size)
        new = lax.bitcast_convert_type(new, values.dtype)
        return slot_values.write_blocks(values, known, new, holes.blocks)

    return pool, put_back(scores, new.scores), put_back(positions, new.positions)


def _in_tiles(per_kv: Array, fill: int, tiles: Tiling) -> Array:
    """``[rows, kvs]`` as ``[rows, tiles, tile kvs]``."""
    pad = tiles.tiles * tiles.kvs - per_kv.shape[1]
    return jnp.pad(per_kv, ((0, 0), (0, pad)), constant_values=fill).reshape(-1, tiles.tiles, tiles.kvs)


def _marked(marked: Array, unmarked: int, tiles: Tiling) -> Marked:
    """What is marked, ``bool[rows, kvs]``; other KVs get the number ``unmarked``."""
    number = jnp.where(marked, jnp.cumsum(marked, axis=1, dtype=jnp.int32) - 1, unmarked)
    in_tile = _in_tiles(marked.astype(jnp.int32), 0, tiles).sum(-1)
    before = jnp.pad(jnp.cumsum(in_tile, axis=1), ((0, 0), (1, 0)))
    in_block = marked.reshape(len(marked), tiles.max_blocks, tiles.block_size).any(-1)
    first = jnp.argmax(in_block, axis=1)
    end = jnp.where(in_block.any(1), tiles.max_blocks - jnp.argmax(in_block[:, ::-1], axis=1), first)
    span = jnp.stack([first, end], axis=1).astype(jnp.int32)
    spread = Spread(span.reshape(-1), before.astype(jnp.int32).reshape(-1))
    return Marked(_in_tiles(number, unmarked, tiles), spread, in_block)


def _kernel(
    table: Any,
    source: Spread,
    hole: Spread,
    source_number: Any,
    hole_number: Any,
    old: Values,
    pool: Any,
    moved_pool: Any,
    new: Values,
    source_tiles: tuple[Any, Any, Any],
    hole_tiles: tuple[Any, Any, Any],
    gathered: Any,
    stages: Stages,
    *,
    tiles: Tiling,
) -> None:
    """``pool`` and ``moved_pool`` are the same memory; a row's sources lie in later blocks than its holes."""
    core, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    row, items = core * steps + step, (core * steps, (core + 1) * steps)

    def stream(span: Any, scratch: tuple[Any, Any, Any]) -> TileStream:
        return TileStream(tiles, pool, table, lambda r: (span[2 * r], span[2 * r + 1]), scratch, items)

    sources, holes = stream(source.span, source_tiles), stream(hole.span, hole_tiles)

    @pl.when(step == 0)
    def _():
        sources.start()
        holes.start()
        for i in range(STAGES + 1):
            stages.state[i] = 0

    for before, after in zip(old, new, strict=True):
        after[...] = before[...]

    def gather(source_tile: Array, hole_tile: Array, slot: Array) -> None:
        """What this source tile has for this tile of holes."""
        number = as_column(source_number[0, pl.ds(source_tile, 1)])
        is_move = number == hole_number[0, pl.ds(hole_tile, 1)]
        kv = jnp.where(number >= 0, sources.buffer[slot].astype(jnp.float32), 0.0).astype(pool.dtype)
        ones = is_move.astype(jnp.float32).astype(pool.dtype)
        gathered[...] += product(ones, kv, (0, 0))
        fills = is_move.astype(jnp.int32).sum(0, keepdims=True) > 0
        for before, after in zip(old, new, strict=True):
            value = jnp.where(is_move, as_column(before[0, pl.ds(source_tile, 1)]), 0).sum(0, keepdims=True)
            after[0, pl.ds(hole_tile, 1)] = jnp.where(fills, value, after[0, pl.ds(hole_tile, 1)])

    def blocks_of(stage: Array, tile: Array) -> tuple[Array, Array, Any]:
        """First and end of the entries to store, and the copy of one of them."""
        first = jnp.maximum(hole.span[2 * row], tile * tiles.blocks)
        end = jnp.minimum(hole.span[2 * row + 1], (tile + 1) * tiles.blocks)

        def copy(entry: Array) -> Any:
            at = pl.multiple_of((entry - tile * tiles.blocks) * tiles.block_size, tiles.block_size)
            block = moved_pool.at[table[row * tiles.max_blocks + entry]]
            return pltpu.make_async_copy(
                stages.tiles.at[stage, pl.ds(at, tiles.block_size)], block, stages.stored.at[stage]
            )

        return first, end, copy

    def await_stage(stage: Array) -> None:
        one = stages.tiles.at[0, pl.ds(0, tiles.block_size)]
        wait = pltpu.make_async_copy(one, one, stages.stored.at[stage]).wait
        lax.fori_loop(0, stages.state[stage], lambda _, __: wait(), None)
        stages.state[stage] = 0

    def store(tile: Array) -> None:
        """The tile of holes goes back, with what was gathered in its holes."""
        slot = holes.take(row, tile)
        stage = stages.state[STAGES]
        await_stage(stage)
        is_hole = as_column(hole_number[0, pl.ds(tile, 1)]) >= 0
        kept = holes.buffer[slot].astype(jnp.float32)
        stages.tiles[stage] = jnp.where(is_hole, gathered[...], kept).astype(pool.dtype)
        gathered[...] = jnp.zeros(gathered.shape, gathered.dtype)
        first, end, copy = blocks_of(stage, tile)
        lax.fori_loop(first, end, lambda entry, _: copy(entry).start(), None)
        stages.state[stage] = end - first
        stages.state[STAGES] = lax.rem(stage + 1, jnp.int32(STAGES))

    width = tiles.tiles + 1
    moves = source.before[row * width + tiles.tiles]

    @pl.when(moves > 0)
    def _():
        gathered[...] = jnp.zeros(gathered.shape, gathered.dtype)

        def pair(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            _, source_tile, hole_tile, slot = state
            gather(source_tile, hole_tile, slot)
            source_end = source.before[row * width + source_tile + 1]
            hole_end = hole.before[row * width + hole_tile + 1]
            done = jnp.minimum(source_end, hole_end)
            pl.when(hole_end == done)(lambda: store(hole_tile))
            next_source = jnp.where(source_end == done, source_tile + 1, source_tile)
            slot = lax.cond((source_end == done) & (done < moves), lambda: sources.take(row, next_source), lambda: slot)
            return done, next_source, jnp.where(hole_end == done, hole_tile + 1, hole_tile), slot

        (first_source, _), (first_hole, _) = sources.tiles(row), holes.tiles(row)
        start = jnp.int32(0), first_source, first_hole, sources.take(row, first_source)
        lax.while_loop(lambda state: state[0] < moves, pair, start)

    @pl.when(step == steps - 1)
    def _():
        for stage in range(STAGES):
            await_stage(jnp.int32(stage))
