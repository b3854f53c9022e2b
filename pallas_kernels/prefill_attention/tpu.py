"""Chunk attention as a TPU kernel: a span of queries with its whole group, over its own keys and then cached tiles.

All query heads of a KV head share what is read for it: ``group * block`` queries make the rows of one matrix product.
The blocks of a span meet each tile in turn, written out one after the other: while one's logits become probabilities,
which is the vector unit's work, the next one's are in the matrix unit. Masses are a second kernel (``tpu_masses``),
since a query's probabilities are known only after its last key.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kvs import RawKVs
from pallas_kernels.prefill_attention.tpu_masses import LOG2_E, as_wide, masses, queries_a_block
from pallas_kernels.prefill_attention.types import ObservedQueries
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

QUERY_ROWS = 512
"""Queries of all heads of a group in one product, about."""
SPAN = 512
"""Queries of each head that read a cached tile once, at most."""
SPAN_BLOCKS = 4
"""Blocks of a span, at most: as many bodies are compiled."""
TILE_KVS = 512


def prefill_attention(
    query: Array,
    key: Array,
    value: Array,
    raw: RawKVs,
    *,
    observe: ObservedQueries | None = None,
    tiles: Tiling | None = None,
    query_rows: int = QUERY_ROWS,
    smem_entries: int = SMEM_ENTRIES,
    interpret: Any = False,
) -> tuple[Array, tuple[Array, Array] | None]:
    """See ``api.prefill_attention``; ``tiles``, ``query_rows`` and ``smem_entries`` are for tests.

    Raises:
      ValueError: a table row too long for SMEM.
    """
    batch, length, heads, head_dim = query.shape
    pool, block_table, lengths = raw
    kv_heads, max_blocks = block_table.shape[1:]
    at_once = rows_at_once(max_blocks, smem_entries)
    tiles = tiles or tiling(pool, max_blocks, kvs=TILE_KVS)
    rows, group = batch * kv_heads, heads // kv_heads
    block = queries_a_block(length, group, query_rows)
    span = queries_a_span(length, block)
    padded = -(-length // span) * span
    lanes = lanes_of(pool)

    def pad(x: Array, width: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, width - head_dim)))

    grouped = pad(query, lanes.width).reshape(batch, padded, kv_heads, group, -1).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, group, padded, -1).astype(pool.dtype)
    own = jnp.concatenate([pad(key, lanes.half), pad(value, lanes.half)], axis=-1).transpose(0, 2, 1, 3)
    own = jnp.pad(own.reshape(rows, padded, -1).astype(pool.dtype), ((0, 0), (0, -padded % LANES), (0, 0)))
    per_row = grouped, own, block_table.reshape(rows, max_blocks), lengths.reshape(rows)
    run = partial(
        _run, pool, dtype=query.dtype, block=block, span=span, head_dim=head_dim, tiles=tiles, interpret=interpret
    )
    parts = [run(*(x[at : at + at_once] for x in per_row)) for at in range(0, rows, at_once)]
    out, log_total = (jnp.concatenate(xs) for xs in zip(*parts, strict=True))
    out = out.reshape(batch, kv_heads, group, padded, -1)[:, :, :, :length, lanes.value_at : lanes.value_at + head_dim]
    out = out.transpose(0, 3, 1, 2, 4).reshape(query.shape)
    if observe is None:
        return out, None
    on_cached, on_own = masses(
        pool,
        *per_row,
        log_total,
        observe,
        head_dim=head_dim,
        tiles=tiles,
        query_rows=query_rows,
        at_once=at_once,
        interpret=interpret,
    )
    kvs = max_blocks * tiles.block_size
    return out, (
        on_cached.reshape(batch, heads, -1)[..., :kvs],
        on_own.reshape(batch, heads, -1)[..., :length],
    )


def queries_a_span(length: int, block: int) -> int:
    """Queries of each head in a grid step: whole blocks, and of several spans also whole tiles of own keys."""
    most = max(LANES, min(SPAN, SPAN_BLOCKS * block))
    spans = -(-length // most)
    whole = block if spans == 1 else max(block, LANES)
    return -(-length // (spans * whole)) * whole


def check(pool: Array, head_dim: int) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_pool(pool, head_dim)


def _run(
    pool: Array,
    query: Array,
    own: Array,
    table: Array,
    lengths: Array,
    *,
    dtype: Any,
    block: int,
    span: int,
    head_dim: int,
    tiles: Tiling,
    interpret: Any,
) -> tuple[Array, Array]:
    """One call.

    Args:
      pool: ``[blocks, block_size, 2 * half]``.
      query: ``[rows, group, length, width]``.
      own: ``[rows, kvs, 2 * half]``, of at least as many KVs as there are queries.
      table: ``i32[rows, max_blocks]``.
      lengths: ``i32[rows]``.

    Returns:
      Output ``[rows, group, length, width]`` and the log of each query's softmax sum, ``f32[rows, group, length]``.
    """
    rows, group, length, width = query.shape
    spans, blocks = length // span, span // block
    steps = -(-rows // CORES)

    def row_of(core: Array, step: Array) -> Array:
        return core * steps + step  # of an odd number of rows the last step's is one past the end, and nobody's

    def read_row(core: Array, step: Array) -> Array:
        return jnp.minimum(row_of(core, step), rows - 1)

    of_query = (1, group, span, width)
    of_log = (1, blocks, group * block)
    out, log_total = pl.pallas_call(
        partial(_kernel, scale=head_dim**-0.5, tiles=tiles, rows=rows, steps=steps, block=block, spans=spans),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(CORES, steps, spans),
            in_specs=[
                pl.BlockSpec(of_query, lambda core, step, part, *_: (read_row(core, step), 0, part, 0)),
                pl.BlockSpec((1, *own.shape[1:]), lambda core, step, part, *_: (read_row(core, step), 0, 0)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[
                pl.BlockSpec(of_query, lambda core, step, part, *_: (row_of(core, step), 0, part, 0)),
                pl.BlockSpec(of_log, lambda core, step, part, *_: (row_of(core, step) * spans + part, 0, 0)),
            ],
            scratch_shapes=[
                *TileStream.scratch_shapes(tiles, pool),
                *[pltpu.VMEM((blocks, group * block, lanes), jnp.float32) for lanes in (LANES, LANES, width)],
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((CORES * steps, group, length, width), dtype),
            jax.ShapeDtypeStruct((CORES * steps * spans, blocks, group * block), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=48 * 2**20, **UNCHECKED
        ),
        name="prefill_attention",
        interpret=interpret,
    )(lengths, table.reshape(-1), query, own, pool)
    log_total = log_total.reshape(-1, spans * blocks, group, block).transpose(0, 2, 1, 3)
    return out[:rows], log_total.reshape(-1, group, length)[:rows]


def _kernel(
    lengths: Any,
    table: Any,
    query_ref: Any,
    own: Any,
    pool: Any,
    out_ref: Any,
    log_ref: Any,
    buffer: Any,
    arrived: Any,
    state: Any,
    maximum: Any,
    total: Any,
    output: Any,
    *,
    scale: float,
    tiles: Tiling,
    rows: int,
    steps: int,
    block: int,
    spans: int,
) -> None:
    core, step, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    row = core * steps + step
    item = row * spans + part
    _, group, span, width = query_ref.shape
    blocks, queries = range(span // block), group * block
    value_at = buffer.shape[-1] - width

    items = core * steps * spans, jnp.minimum((core + 1) * steps, rows) * spans
    stream = TileStream(
        tiles, pool, table, held_blocks(lengths, tiles, spans), (buffer, arrived, state), items, repeats=spans
    )
    pl.when((step == 0) & (part == 0))(stream.start)

    def logits(at: int, kv: Array) -> Array:
        """Of a block's queries and keys ``[kvs, 2 * half]``, ``[queries, kvs]``: to the base of 2, like all here."""
        query = query_ref[0, :, at * block : (at + 1) * block].reshape(queries, width)
        return product(query, kv[:, :width], (1, 1)) * (scale * LOG2_E)

    def begin(at: int, kv: Array) -> None:
        """The softmax over the block's own keys and those before them in its span, which come last and first."""
        s = logits(at, kv)
        before = at * block // LANES * LANES
        shape = group, block, s.shape[1] - before
        key = lax.broadcasted_iota(jnp.int32, shape, 2) + before
        query = lax.broadcasted_iota(jnp.int32, shape, 1) + at * block
        near = jnp.where((key <= query).reshape(queries, -1), s[:, before:], MASKED)
        s = jnp.concatenate([s[:, :before], near], axis=1) if before else near
        top = over_lanes(s.max(-1, keepdims=True))
        p = jnp.exp2(s - as_wide(top, s.shape[1]))
        maximum[at], total[at] = top, over_lanes(p.sum(-1, keepdims=True))
        output[at] = product(p.astype(kv.dtype), kv[:, value_at:], (1, 0))

    def attend(at: int, kv: Array, left: Array | None = None) -> None:
        """Keys ``[kvs, 2 * half]``, or so many of them, into a block's running softmax."""
        s = logits(at, kv)
        if left is not None:
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 1) < left, s, MASKED)
        top = jnp.maximum(maximum[at], over_lanes(s.max(-1, keepdims=True)))
        p = jnp.exp2(s - as_wide(top, s.shape[1]))
        decay = jnp.exp2(maximum[at] - top)
        out = product(p.astype(kv.dtype), kv[:, value_at:], (1, 0))
        maximum[at], total[at] = top, total[at] * decay + over_lanes(p.sum(-1, keepdims=True))
        output[at] = output[at] * as_wide(decay, width) + out

    def attend_span(before: Array, _: None) -> None:
        kv = own[0, pl.ds(pl.multiple_of(before * span, span), span)]
        for at in blocks:
            attend(at, kv)

    def attend_cached(tile: Array, _: None) -> None:
        slot = stream.take(item, tile)
        left = lengths[row] - tile * tiles.kvs
        stream.clear_past(slot, left, tiles.kvs, value_at)
        for at in blocks:
            attend(at, buffer[slot], left)

    @pl.when(row < rows)
    def _():
        for at in blocks:
            end = -(-(at + 1) * block // LANES) * LANES
            begin(at, own[0, pl.ds(pl.multiple_of(part * span, span), end)])
        if spans > 1:
            lax.fori_loop(0, part, attend_span, None)
        lax.fori_loop(0, stream.tiles(item)[1], attend_cached, None)
        for at in blocks:
            out = output[at] / as_wide(total[at], width)
            out_ref[0, :, at * block : (at + 1) * block] = out.reshape(group, block, width).astype(out_ref.dtype)
            log_ref[0, at : at + 1] = jnp.transpose((maximum[at] + jnp.log2(total[at])) / LOG2_E)[:1]


def over_lanes(column: Array) -> Array:
    """``[n, 1]`` in each of a register's lanes, where what goes by rows needs no more shuffling."""
    return jnp.broadcast_to(column, (column.shape[0], LANES))
