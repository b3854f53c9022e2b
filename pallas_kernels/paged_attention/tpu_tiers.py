"""Attention over both tiers as a TPU kernel: one grid step a row (a KV head of a sequence), its blocks stream_scratch.

A row is two items of one stream: its high blocks, from the left of its table, then its low ones, from the right. Each
tier has a softmax of its own; these, and that of the unquantised KVs, are joined at the end. Codes go to the matrix
unit as they are. Vectors that share a row of words meet one query each: the other's half of it is zero.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention import tpu, tpu_partial
from pallas_kernels.paged_attention.tpu_tiers_significance import Kept, Least
from pallas_kernels.paged_attention.tpu_tiers_softmax import Attention, BlockStream, KVs, Softmax, join
from pallas_kernels.paged_attention.types import Observe, Observed, Significance, Significant, TieredKVs, Weakest
from pallas_kernels.quantised_block import BlockLayout
from pallas_kernels.quantised_block.layout import LANES
from pallas_kernels.quantised_block.tpu_vectors import SUBLANES, check_layout
from pallas_kernels.tpu_tiles import BUFFERS, CORES, SMEM_ENTRIES, UNCHECKED, Tiling, rows_at_once
from pallas_kernels.tpu_values import ceil_div

TILE_BYTES = 1024 * 1024
"""Twice those of unquantised KVs: a tile's latency at its ends counts for more where there are fewer bytes."""

MOST_BLOCKS = 64
"""Of a tile: each is code of its own, which must be compiled."""


class Beside(NamedTuple):
    """The softmax over unquantised KVs."""

    output: Any
    """``f32[rows, padded group, 128]``."""
    sums: Any
    """Of the same shape: maximum and sum are the first two lanes."""


class Rows(NamedTuple):
    """What the kernel takes of each row."""

    table: Array
    """``i32[rows, max_blocks]``."""
    lengths: Array
    """``i32[rows, 2]``."""
    query: Array
    """``f32[rows, padded group, 128]``."""
    following: Array | None
    """The next position, ``i32[rows]``, if significance is wanted."""
    raw: Beside | None
    """If there are unquantised KVs."""


def paged_attention(
    query: Array,
    raw: RawKVs | None,
    tiers: TieredKVs,
    *,
    observe: Observe | Significance | None = None,
    next_position: Array | None = None,
    tiles: Tiling | None = None,
    smem_entries: int = SMEM_ENTRIES,
    interpret: Any = False,
) -> tuple[Array, Observed | Significant | None]:
    """See ``api.paged_attention``.

    ``tiles`` and ``smem_entries`` are for tests: how heads are cut, and how large a table one call may take.

    Raises:
      ValueError: a table row too long for SMEM.
    """
    batch, heads, head_dim = query.shape
    pool, layout = tiers.pool, tiers.layout
    kv_heads, max_blocks = tiers.block_table.shape[1:]
    at_once = rows_at_once(max_blocks + 3, smem_entries)
    tiles = tiles or tiling(layout, max_blocks)
    rows, group = batch * kv_heads, heads // kv_heads

    if observe is None or isinstance(observe, Significance):
        significance, all_kvs = observe, False
    else:
        significance, all_kvs = Significance.of_scores(observe), True
        next_position = jnp.zeros(batch, jnp.int32)
    padded = -(-group // SUBLANES) * SUBLANES
    beside, p = (None, None) if raw is None else _attend_raw(query, raw, padded, interpret, keep=all_kvs)
    spread = query.reshape(rows, group, head_dim).astype(jnp.float32)
    spread = jnp.pad(spread, ((0, 0), (0, padded - group), (0, LANES - head_dim)))
    whole = Rows(
        table=tiers.block_table.reshape(rows, max_blocks),
        lengths=tiers.lengths.reshape(rows, 2),
        query=spread,
        following=None if next_position is None else jnp.repeat(next_position.astype(jnp.int32), kv_heads),
        raw=beside,
    )
    run = partial(
        _run,
        layout=layout,
        dtype=jnp.bfloat16 if query.dtype == jnp.bfloat16 else jnp.float32,
        group=group,
        significance=significance,
        sums=p is not None,
        tiles=tiles,
        interpret=interpret,
    )
    parts = []
    for at in range(0, rows, at_once):
        pool, *part = run(pool, jax.tree.map(lambda x, at=at: x[at : at + at_once], whole))
        parts.append(part)
    out, weakest, sums = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    out = out[:, :group, :head_dim].reshape(batch, heads, head_dim).astype(query.dtype)
    if weakest is None:
        return out, None
    if not isinstance(observe, Significance):
        assert observe is not None
        assert beside is not None
        weight = jnp.exp(beside.sums[..., 0] - sums[..., 0]) * beside.sums[..., 1] / sums[..., 1]
        return out, Observed(observe(p * weight[:, :group].reshape(batch, kv_heads, group, 1)), pool)
    value, index = (x[:, 0, :2].reshape(batch, kv_heads, 2) for x in weakest)
    return out, Significant(pool, Weakest(value=value, index=index))


def check(query: Array, raw: RawKVs | None, tiers: TieredKVs) -> None:
    """Raises ValueError for what the kernels can't take."""
    check_layout(tiers.layout)
    if raw is not None:
        tpu.check(query, raw)


def tiling(layout: BlockLayout, max_blocks: int) -> Tiling:
    """Tiles of about ``TILE_BYTES``, of a power of two of blocks: halves and quarters are whole, divisions shifts."""
    blocks = max(1, min(TILE_BYTES // layout.block_bytes, MOST_BLOCKS, max_blocks))
    blocks = 1 << blocks.bit_length() - 1
    return Tiling(block_size=layout.rows, blocks=blocks, max_blocks=max_blocks, buffers=BUFFERS)


def _attend_raw(query: Array, raw: RawKVs, padded: int, interpret: Any, *, keep: bool) -> tuple[Beside, Array | None]:
    """And if they are to be kept the probabilities among the unquantised KVs."""
    batch, kv_heads = raw.lengths.shape
    rows, head_dim = batch * kv_heads, query.shape[-1]
    attend = tpu_partial.partial_probabilities if keep else tpu_partial.partial_attention
    output, sums, *p = attend(query, raw, interpret=interpret)
    output = output.reshape(rows, -1, head_dim) * sums[..., 1:2]
    padding = ((0, 0), (0, padded - output.shape[1]))
    beside = Beside(*(jnp.pad(x, (*padding, (0, LANES - x.shape[2]))) for x in (output, sums)))
    return beside, p[0] if keep else None


def _run(
    pool: Array,
    whole: Rows,
    *,
    layout: BlockLayout,
    dtype: Any,
    group: int,
    significance: Significance | None,
    sums: bool,
    tiles: Tiling,
    interpret: Any,
) -> tuple[Array, Array, Least | None, Array | None]:
    """One call over some rows: the pool; output ``f32[rows, padded group, 128]``; what is least, ``[rows, 1, 128]``
    each, the tiers in the first lanes; and if they are asked for the softmax's sums, like ``Beside.sums``."""
    rows, padded, _ = whole.query.shape
    steps = -(-rows // CORES)
    whole = jax.tree.map(lambda x: jnp.pad(x, ((0, CORES * steps - rows), *[(0, 0)] * (x.ndim - 1))), whole)
    of_group, of_weakest = (
        pl.BlockSpec((1, height, LANES), lambda core, step, *_: (core * steps + step, 0, 0)) for height in (padded, 1)
    )
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    grouped = jax.ShapeDtypeStruct(whole.query.shape, jnp.float32)
    out_specs: tuple[Any, ...] = None, of_group, None, of_group if sums else None
    out_shape: tuple[Any, ...] = None, grouped, None, grouped if sums else None
    scratch: tuple[Any, ...] = BlockStream.scratch_shapes(tiles, pool), None
    if significance:
        of_each = (jax.ShapeDtypeStruct((CORES * steps, 1, LANES), kind) for kind in (jnp.float32, jnp.int32))
        out_specs = anywhere, of_group, Least(of_weakest, of_weakest), out_specs[3]
        out_shape = jax.ShapeDtypeStruct(pool.shape, pool.dtype), grouped, Least(*of_each), out_shape[3]
        scratch = scratch[0], Kept.scratch_shapes(tiles, layout, padded)
    room = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(scratch) if x.memory_space == pltpu.VMEM)
    scalars = whole.lengths.reshape(-1), whole.table.reshape(-1), whole.following
    inputs = whole.query, whole.raw
    kernel = partial(
        _kernel, layout=layout, dtype=dtype, group=group, significance=significance, tiles=tiles, steps=steps
    )
    written, *found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(CORES, steps),
            in_specs=(*jax.tree.map(lambda _: of_group, inputs), anywhere),
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        input_output_aliases={len(jax.tree.leaves((scalars, inputs))): 0} if significance else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=24 * 2**20 + room, **UNCHECKED
        ),
        name="paged_attention_tiers",
        interpret=interpret,
    )(*scalars, *inputs, pool)
    out, weakest, row_sums = jax.tree.map(lambda x: x[:rows], tuple(found))
    return (pool if written is None else written), out, weakest, row_sums


def _kernel(
    lengths: Any,
    table: Any,
    following: Any | None,
    query: Any,
    raw: Beside | None,
    pool: Any,
    written: Any | None,
    out: Any,
    weakest: Least | None,
    row_sums: Any | None,
    stream_scratch: tuple[Any, Any, Any],
    kept_scratch: Any | None,
    *,
    layout: BlockLayout,
    dtype: Any,
    group: int,
    significance: Significance | None,
    tiles: Tiling,
    steps: int,
) -> None:
    """``pool`` and ``written`` are the same memory. What may be None is so without significance, and ``raw`` without
    unquantised KVs."""
    core, step = pl.program_id(0), pl.program_id(1)
    row = core * steps + step

    def count(item: Array) -> Array:
        high, low = (ceil_div(lengths[item], tier.tokens) for tier in layout.tiers)
        return jnp.where(lax.rem(item, jnp.int32(2)) == 1, low, high)

    def span(item: Array) -> tuple[Array, Array]:
        blocks = count(item)
        first = jnp.where(lax.rem(item, jnp.int32(2)) == 1, tiles.max_blocks - blocks, 0)
        return first, first + blocks

    items = 2 * core * steps, 2 * (core + 1) * steps
    stream = BlockStream(tiles, pool, table, span, stream_scratch, items, repeats=2)
    pl.when(step == 0)(stream.start)
    tiers = [
        KVs(tier, 2 * row + index, index == 1, lengths[2 * row + index], count(2 * row + index))
        for index, tier in enumerate(layout.tiers)
    ]
    before = [jnp.int32(0), stream.tiles(tiers[0].item)[1]]
    kept = Kept(stream, written, kept_scratch, row, step) if significance else None
    if kept:
        pl.when(step == 0)(kept.start)
        kept.finish(layout.tiers, kept.turn)

    high, low = (
        Attention(stream, kvs, query[0], layout.head_dim, dtype, partial(kept.keep, kvs, at) if kept else None)
        for kvs, at in zip(tiers, before, strict=True)
    )
    whole = high.run()
    whole = lax.cond(low.kvs.blocks > 0, lambda: join(whole, low.run()), lambda: whole)  # often there are none
    if raw:
        sums = raw.sums[0]
        whole = join(whole, Softmax(sums[:, :1], sums[:, 1:2], raw.output[0]))
    out[0] = whole.output / jnp.maximum(whole.total, jnp.finfo(jnp.float32).tiny)
    if row_sums is not None:
        lane = lax.broadcasted_iota(jnp.int32, row_sums.shape[1:], 1)
        total = jnp.maximum(whole.total, jnp.finfo(jnp.float32).tiny)
        row_sums[0] = jnp.where(lane == 0, whole.maximum, total)

    if kept and weakest and significance and following is not None:
        for index, (kvs, tiles_before) in enumerate(zip(tiers, before, strict=True)):
            found = kept.observe(kvs, tiles_before, whole, significance, following[row], group)
            for ref, part in zip(weakest, found, strict=True):
                here = lax.broadcasted_iota(jnp.int32, ref.shape, 2) == index
                ref[...] = jnp.where(here, part, ref[...])

        @pl.when(step == steps - 1)
        def _():
            for turn in range(2):
                kept.finish(layout.tiers, jnp.int32(turn))
