"""Decode attention for NVIDIA GPUs from Hopper on: long heads are split over programs, partial results are merged.

The KVs of all rows (a row: one KV head of one sequence) are cut into segments of about equal length, one program each,
so the longest head doesn't set the time. A program streams its segment through shared memory, several tiles ahead of
the arithmetic, which runs on the CUDA cores: one query has too few rows to fill a tensor core, and loading takes longer
than computing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_GROUP = 8
SEGMENTS = 2048
"""Segments to aim at: some eight programs for each that a large GPU runs at once, so that the last ones cost little."""
MIN_TILES = 2
"""Tiles of a segment at least; shorter ones would write more partial results than they read KVs."""
TILE_BYTES = 32 * 1024
STAGES = 3
"""Tiles in shared memory, all but one of them on their way: 96 KiB, so two programs fit a multiprocessor."""
MASKED = -1e30  # finite, so that a maximum over nothing is no NaN

SLAB = 8
"""KVs of a tile that the 128 threads take at once: four warps of two rows, 16 lanes to a row, 4 values to a lane."""
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((SLAB, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
KV_LAYOUT = LAYOUT.reduce(1)
DIM_LAYOUT = LAYOUT.reduce(0)


class Work(NamedTuple):
    """Which part of which row each program takes; a program past the last segment has no tiles."""

    row: Array
    """``i32[segments]``; the number of rows where there is no segment."""
    table: Array
    """``i32[segments, 4]``: row, first tile, tiles, KVs of the row."""


def plan_work(lengths: Array, max_kvs: int, tile: int) -> Work:
    """Segments of equal numbers of tiles for ``i32[rows]`` KVs a row."""
    rows = lengths.shape[0]
    tiles = -(-lengths // tile)
    each = jnp.maximum(MIN_TILES, -(-jnp.sum(tiles) // SEGMENTS))
    end = jnp.cumsum(-(-tiles // each))
    most = rows * -(-max_kvs // (tile * MIN_TILES))
    segment = jnp.arange(min(SEGMENTS + rows, most))
    row = jnp.sum(segment[:, None] >= end[None, :], axis=1)
    of = jnp.minimum(row, rows - 1)
    first = (segment - jnp.where(of > 0, end[of - 1], 0)) * each
    count = jnp.where(row < rows, jnp.minimum(each, tiles[of] - first), 0)
    return Work(row, jnp.stack([of, first, count, lengths[of]], axis=1).astype(jnp.int32))


def paged_attention(
    query: Array,
    pool: Array,
    block_table: Array,
    lengths: Array,
    *,
    observe: tuple[Callable[[Array], Array], ...] = (),
    interpret: Any = False,
) -> tuple[Array, tuple[Array, ...]]:
    """See ``api.paged_attention``; ``interpret`` takes ``InterpretGPUParams``.

    Raises:
      ValueError: a shape or dtype that the kernel can't take.
    """
    batch, heads, head_dim = query.shape
    kv_heads, max_blocks = block_table.shape[1:]
    block_size = pool.shape[1]
    rows, group = batch * kv_heads, heads // kv_heads
    check(head_dim, block_size, group, pool.dtype)
    tile = TILE_BYTES // (2 * head_dim * pool.dtype.itemsize)
    width = -(-max_blocks * block_size // tile) * tile

    lengths = lengths.reshape(rows).astype(jnp.int32)
    work = plan_work(lengths, max_blocks * block_size, tile)
    # Powers of two are one instruction each: the logarithm's base goes into the query.
    scaled = (query.astype(jnp.float32) * (head_dim**-0.5 * math.log2(math.e))).reshape(rows, group, head_dim)
    segments = work.row.shape[0]
    out_type = [
        jax.ShapeDtypeStruct((segments, group, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((segments, group), jnp.float32),
        jax.ShapeDtypeStruct((segments, group), jnp.float32),
    ]
    if observe:
        out_type.append(jax.ShapeDtypeStruct((rows, group, width), jnp.float32))
    parts = plgpu.kernel(
        segment_kernel(group, head_dim, tile, block_size, bool(interpret)),
        out_type=tuple(out_type),
        scratch_types=(
            plgpu.SMEM((STAGES, tile, 2 * head_dim), pool.dtype),
            plgpu.Barrier(num_arrivals=max(1, tile // block_size), num_barriers=STAGES),
        ),
        grid=(segments,),
        grid_names=("segment",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=4096
        ),
        interpret=interpret,
    )(scaled, pool, block_table.reshape(rows, max_blocks), work.table)
    output, maximum, total = merge(work.row, rows, *parts[:3])
    output = output.reshape(batch, heads, head_dim).astype(query.dtype)
    if not observe:
        return output, ()
    held = jnp.arange(width) < lengths[:, None, None]
    p = jnp.where(held, jnp.exp2(parts[3] - maximum[..., None]) / total[..., None], 0.0)
    p = p[..., : max_blocks * block_size].reshape(batch, kv_heads, group, -1)
    return output, tuple(f(p) for f in observe)


def check(head_dim: int, block_size: int, group: int, dtype: Any) -> None:
    """Refuses what the kernel can't take."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the GPU kernel takes {HEAD_DIMS=}, not {head_dim=}; use implementation='xla'")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"the GPU kernel takes {BLOCK_SIZES=}, not {block_size=}; use implementation='xla'")
    if not 1 <= group <= MAX_GROUP:
        raise ValueError(f"the GPU kernel takes 1 to {MAX_GROUP} query heads a KV head, not {group=}; use 'xla'")
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"the GPU kernel takes a pool of float32 or bfloat16, not {dtype}; use implementation='xla'")


def segment_kernel(group: int, head_dim: int, tile: int, block_size: int, interpret: bool) -> Callable[..., None]:
    """One segment: partial output, maximum (base 2) and sum, and where it is asked for the logits."""
    piece = min(tile, block_size)  # KVs that one copy brings: never more than a block, nor than a tile

    def load(ref: Any, index: Any, layout: Any) -> Array:
        return ref[index] if interpret else plgpu.load(ref, index, layout=layout, optimized=False)

    def cast(x: Array, layout: Any) -> Array:
        return x if interpret else plgpu.layout_cast(x, layout)

    def place(x: Array, axis: int) -> Array:
        return cast(lax.broadcast_in_dim(x, (SLAB, head_dim), (axis,)), LAYOUT)

    def kernel(
        q_ref: Any,  # f32[rows, group, head_dim], scaled
        pool_ref: Any,  # [blocks, block_size, 2 * head_dim]
        table_ref: Any,  # i32[rows, max_blocks]
        work_ref: Any,  # i32[segments, 4]
        out_ref: Any,  # f32[segments, group, head_dim]
        max_ref: Any,  # f32[segments, group]
        sum_ref: Any,  # f32[segments, group]
        *rest: Any,  # f32[rows, group, width] logits, if observed; then scratch
    ) -> None:
        *logits_ref, kv_smem, arrived = rest
        segment = lax.axis_index("segment")
        row, first, tiles, length = (work_ref[segment, i] for i in range(4))

        def fetch(k: Array | int) -> None:
            """Starts the copies of the segment's ``k``-th tile."""
            slot = lax.rem(jnp.int32(k), jnp.int32(STAGES))
            for i in range(tile // piece):
                start = (first + k) * tile + i * piece
                # A slot past the head's end gets the null block: something must arrive, and it stays in the L2 cache.
                held = start < length
                column = jnp.where(held, lax.div(start, jnp.int32(block_size)), 0)
                block = jnp.where(held, table_ref[row, column], 0)
                inside = lax.rem(start, jnp.int32(block_size))
                plgpu.copy_gmem_to_smem(
                    pool_ref.at[block, pl.ds(inside, piece)],
                    kv_smem.at[slot, pl.ds(i * piece, piece)],
                    arrived.at[slot],
                )

        def attend(k: Array, carry: tuple[Any, Any, Any], query: list[Array]) -> tuple[Any, Any, Any]:
            maximum, total, output = carry
            slot = lax.rem(k, jnp.int32(STAGES))
            plgpu.barrier_wait(arrived.at[slot])
            slabs = range(tile // SLAB)
            logits, held = [], []
            for r in slabs:
                start = (first + k) * tile + r * SLAB
                key = load(kv_smem, (slot, pl.ds(r * SLAB, SLAB), pl.ds(0, head_dim)), LAYOUT).astype(jnp.float32)
                index = cast(lax.broadcasted_iota(jnp.int32, (SLAB,), 0), KV_LAYOUT)
                held.append(index < length - start)
                logits.append([jnp.where(held[r], jnp.sum(key * place(q, 1), axis=1), MASKED) for q in query])
                for ref in logits_ref:
                    for g in range(group):
                        ref[row, g, pl.ds(start, SLAB)] = logits[r][g]
            # Each of the slab's places keeps a softmax of its own; they are joined after the last tile.
            new = [maximum[g] for g in range(group)]
            for r in slabs:
                new = [jnp.maximum(new[g], logits[r][g]) for g in range(group)]
            decay = [jnp.exp2(maximum[g] - new[g]) for g in range(group)]
            total = [total[g] * decay[g] for g in range(group)]
            output = [output[g] * place(decay[g], 0) for g in range(group)]
            for r in slabs:
                value = load(kv_smem, (slot, pl.ds(r * SLAB, SLAB), pl.ds(head_dim, head_dim)), LAYOUT)
                # A freed slot keeps its old bytes, and 0 * NaN is NaN: V is masked too.
                value = jnp.where(place(held[r], 0), value.astype(jnp.float32), 0.0)
                for g in range(group):
                    p = jnp.where(held[r], jnp.exp2(logits[r][g] - new[g]), 0.0)
                    total[g] = total[g] + p
                    output[g] = output[g] + place(p, 0) * value

            @pl.when(k + STAGES < tiles)
            def _():
                fetch(k + STAGES)

            return new, total, output

        @pl.when(tiles > 0)
        def _():
            for k in range(STAGES):
                pl.when(k < tiles)(lambda k=k: fetch(k))
            query = [load(q_ref, (row, g), DIM_LAYOUT) for g in range(group)]
            start = (
                [cast(jnp.full((SLAB,), MASKED, jnp.float32), KV_LAYOUT) for _ in query],
                [cast(jnp.zeros((SLAB,), jnp.float32), KV_LAYOUT) for _ in query],
                [cast(jnp.zeros((SLAB, head_dim), jnp.float32), LAYOUT) for _ in query],
            )
            maximum, total, output = lax.fori_loop(0, tiles, lambda k, c: attend(k, c, query), start)
            for g in range(group):
                highest = jnp.max(maximum[g], axis=0)
                weight = jnp.exp2(maximum[g] - highest)
                max_ref[segment, g] = highest
                sum_ref[segment, g] = jnp.sum(total[g] * weight, axis=0)
                out_ref[segment, g] = jnp.sum(output[g] * place(weight, 0), axis=0)

    return kernel


def merge(row: Array, rows: int, output: Array, maximum: Array, total: Array) -> tuple[Array, Array, Array]:
    """Partial results of the segments joined by row: normalised output, maximum and sum."""
    highest = jax.ops.segment_max(maximum, row, rows, indices_are_sorted=True)  # what is past the last row is dropped
    weight = jnp.exp2(maximum - highest[row])
    whole = jax.ops.segment_sum(total * weight, row, rows, indices_are_sorted=True)
    whole = jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)
    output = jax.ops.segment_sum(output * weight[..., None], row, rows, indices_are_sorted=True)
    return output / whole[..., None], highest, whole
