"""What the observed queries' attention puts on every key, as a TPU kernel: a second pass, with the softmax known."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.prefill_attention.types import ObservedQueries
from pallas_kernels.tpu_tiles import CORES, UNCHECKED, TileStream, Tiling, held_blocks
from pallas_kernels.tpu_values import LANES, as_column, product

LOG2_E = math.log2(math.e)


def queries_a_block(count: int, group: int, query_rows: int) -> int:
    """Queries of each head in one product: a power of two, so that all heads' are about ``query_rows``, or all."""
    return min(max(16, 1 << (query_rows // group).bit_length() - 1), -(-count // 16) * 16)


def as_wide(rows: Array, width: int) -> Array:
    """``[n, 128]``, the same in all lanes, for what is ``[n, width]``."""
    return jnp.concatenate([rows] * -(-width // LANES), axis=1)[:, :width]


def masses(
    pool: Array,
    query: Array,
    own: Array,
    table: Array,
    lengths: Array,
    log_total: Array,
    observed: ObservedQueries,
    *,
    head_dim: int,
    tiles: Tiling,
    query_rows: int,
    at_once: int,
    interpret: Any,
) -> tuple[Array, Array]:
    """Masses on the cached keys, ``f32[rows, group, tiles * kvs]``, and on the chunk's own, ``[rows, group, length]``.

    Args:
      pool, query, own, table, lengths: as ``tpu._run`` takes them.
      log_total: ``f32[rows, group, length]`` log of each query's softmax sum.
      observed: see ``types.ObservedQueries``.
      head_dim: of the model; the arrays may be padded.
      tiles: how heads are cut.
      query_rows: queries of all heads of a group in one product, about.
      at_once: rows whose tables fit in SMEM.
      interpret: as ``pl.pallas_call`` takes it.
    """
    rows, group, _, width = query.shape
    batch, count = observed.rows.shape
    kv_heads = rows // batch
    block = queries_a_block(count, group, query_rows)
    blocks = -(-count // block)

    index = jnp.pad(observed.rows, ((0, 0), (0, blocks * block - count)), constant_values=-1)
    is_real, at = index >= 0, jnp.maximum(index, 0)
    # A query tells of own keys up to one index and of cached keys up to one position; -1 tells of none.
    position = jnp.take_along_axis(observed.positions, jnp.minimum(at, observed.positions.shape[1] - 1), axis=1)
    last = jnp.stack([jnp.where(is_real, x - observed.buffer, -1) for x in (at, position)], axis=1)  # [batch, 2, count]
    last = last.reshape(batch, 2, blocks, block).transpose(0, 2, 1, 3)
    last = jnp.repeat(last, kv_heads, axis=0).reshape(rows, blocks, 2, block)
    at = jnp.repeat(at, kv_heads, axis=0)
    seen = jnp.take_along_axis(query, at[:, None, :, None], axis=2).reshape(rows, group, blocks, block, width)
    seen = seen.transpose(0, 2, 1, 3, 4).reshape(rows, blocks, group * block, width)
    log_seen = jnp.take_along_axis(log_total, at[:, None], axis=2).reshape(rows, group, blocks, block)
    log_seen = log_seen.transpose(0, 2, 1, 3).reshape(rows, blocks, 1, group * block) * LOG2_E

    # Most chunks of a long prompt are observed by nobody: what they find cached isn't read again.
    is_seen = jnp.repeat(is_real.any(1), kv_heads)
    per_row = [table, jnp.where(is_seen, lengths, 0), seen, log_seen, last, own]
    if observed.buffer:
        pad = tiles.tiles * tiles.kvs - observed.cached_positions.shape[-1]
        positions = jnp.pad(observed.cached_positions.reshape(rows, -1), ((0, 0), (0, pad)))
        per_row.append(positions.reshape(rows, tiles.tiles, tiles.kvs))
    run = partial(
        _run, pool, function=observed.function, scale=head_dim**-0.5, group=group, tiles=tiles, interpret=interpret
    )
    parts = [run(*(x[i : i + at_once] for x in per_row)) for i in range(0, rows, at_once)]
    on_cached, on_own = (jnp.concatenate(xs) for xs in zip(*parts, strict=True))
    return on_cached, on_own


def _run(
    pool: Array,
    table: Array,
    lengths: Array,
    seen: Array,
    log_seen: Array,
    last: Array,
    own: Array,
    *positions: Array,
    function: Any,
    scale: float,
    group: int,
    tiles: Tiling,
    interpret: Any,
) -> tuple[Array, Array]:
    """One call: seen ``[rows, blocks, group * block, width]``, last ``i32[rows, blocks, 2, block]``."""
    rows, blocks, queries, width = seen.shape
    length = own.shape[1]
    steps = -(-rows // CORES)

    def of(*shape: int, by_block: bool = False, last: int = rows - 1) -> pl.BlockSpec:
        def index(core: Array, step: Array, block: Array, *_: Any) -> tuple[Any, ...]:
            row = jnp.minimum(core * steps + step, last)
            return (row, block if by_block else 0, *[0] * (len(shape) - 1))

        return pl.BlockSpec((1, *shape), index)

    on_cached, on_own = pl.pallas_call(
        partial(_kernel, function=function, scale=scale, tiles=tiles, rows=rows, steps=steps, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(CORES, steps, blocks),
            in_specs=[
                of(1, queries, width, by_block=True),
                of(1, 1, queries, by_block=True),
                of(1, 2, queries // group, by_block=True),
                of(length, own.shape[-1]),
                *[of(tiles.tiles, tiles.kvs) for _ in positions],
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[of(tiles.tiles, group, tiles.kvs, last=CORES * steps), of(group, length, last=CORES * steps)],
            scratch_shapes=[*TileStream.scratch_shapes(tiles, pool)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((CORES * steps, tiles.tiles, group, tiles.kvs), jnp.float32),
            jax.ShapeDtypeStruct((CORES * steps, group, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=48 * 2**20, **UNCHECKED
        ),
        name="prefill_masses",
        interpret=interpret,
    )(lengths, table.reshape(-1), seen, log_seen, last, own, *positions, pool)
    return on_cached[:rows].transpose(0, 2, 1, 3).reshape(rows, group, -1), on_own[:rows]


def _kernel(
    lengths: Any,
    table: Any,
    seen: Any,
    log_seen: Any,
    last: Any,
    own: Any,
    *rest: Any,
    function: Any,
    scale: float,
    tiles: Tiling,
    rows: int,
    steps: int,
    blocks: int,
) -> None:
    *positions, pool, on_cached, on_own, buffer, arrived, state = rest
    core, step, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    row = core * steps + step
    item = row * blocks + block
    group, width = on_own.shape[1], seen.shape[-1]

    items = core * steps * blocks, jnp.minimum((core + 1) * steps, rows) * blocks
    stream = TileStream(
        tiles, pool, table, held_blocks(lengths, tiles, blocks), (buffer, arrived, state), items, repeats=blocks
    )
    pl.when((step == 0) & (block == 0))(stream.start)

    log = jnp.transpose(jnp.broadcast_to(log_seen[0, 0], (LANES, seen.shape[2])))

    def mass(key: Array, visible: Any) -> Array:
        """Sum over the queries, ``[group, kvs]``; visible: indices ``[1, 1, kvs]`` -> ``bool[1, block, kvs]``."""
        s = product(seen[0, 0], key, (1, 1)) * (scale * LOG2_E)
        p = function(jnp.exp2(s - as_wide(log, s.shape[1])))
        p = p.reshape(group, -1, p.shape[-1])
        return jnp.where(visible(lax.broadcasted_iota(jnp.int32, (1, 1, p.shape[-1]), 2)), p, 0.0).sum(1)

    own_last, cached_last = (as_column(last[0, 0, i : i + 1])[None] for i in range(2))

    def add_cached(tile: Array, _: None) -> None:
        slot = stream.take(item, tile)
        left = lengths[row] - tile * tiles.kvs

        def visible(index: Array) -> Array:
            limit = positions[0][0, pl.ds(tile, 1)][None] if positions else jnp.zeros(index.shape, jnp.int32)
            return (index < left) & (limit <= cached_last)

        on_cached[0, tile] += mass(buffer[slot, :, :width], visible)

    @pl.when(row < rows)
    def _():
        @pl.when(block == 0)
        def _():
            on_cached[...] = jnp.zeros(on_cached.shape, on_cached.dtype)
            on_own[...] = jnp.zeros(on_own.shape, on_own.dtype)

        lax.fori_loop(0, stream.tiles(item)[1], add_cached, None)
        on_own[0] += mass(own[0, :, :width], lambda index: index <= own_last)
