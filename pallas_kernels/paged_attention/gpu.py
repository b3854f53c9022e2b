"""Decode attention for NVIDIA Hopper GPUs: long heads are split over programs, partial results are merged.

The KVs of all rows (a row: one KV head of one sequence) are cut into segments of about equal length, one program each,
which streams its segment through shared memory, several tiles ahead of the arithmetic: on the tensor cores for
bfloat16, on the CUDA cores for float32. What loading takes is the time; the arithmetic is to stay out of its way.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_warpgroup import LANE, check_block_size, check_pool, tiled
from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention import gpu_cuda_cores, gpu_tensor_cores
from pallas_kernels.paged_attention.gpu_merge import merge
from pallas_kernels.paged_attention.gpu_segments import STAGES, TILE_BYTES, copies, plan_work
from pallas_kernels.paged_attention.gpu_tensor_cores import QUERIES
from pallas_kernels.paged_attention.types import Observe


def paged_attention(
    query: Array, raw: RawKVs, *, observe: Observe | None = None, interpret: Any = False
) -> tuple[Array, Array | None]:
    """See ``api.paged_attention``; ``interpret`` takes ``InterpretGPUParams``."""
    batch, heads, head_dim = query.shape
    output, maximum, total, logits = partial_attention(query, raw, keep=observe is not None, interpret=interpret)
    output = output.reshape(batch, heads, head_dim).astype(query.dtype)
    if observe is None:
        return output, None
    return output, observe(probabilities(logits[0], raw, maximum, total))


def probabilities(logits: Array, raw: RawKVs, maximum: Array, total: Array) -> Array:
    """``f32[batch, kv_heads, group, max_blocks * block_size]`` from kept logits, and a row's maximum and sum."""
    batch, kv_heads, max_blocks = raw.block_table.shape
    held = jnp.arange(logits.shape[2]) < raw.lengths.reshape(-1, 1, 1)
    p = jnp.where(held, jnp.exp2(logits - maximum[..., None]) / total[..., None], 0.0)
    return p[..., : max_blocks * raw.pool.shape[1]].reshape(batch, kv_heads, logits.shape[1], -1)


def partial_attention(
    query: Array, raw: RawKVs, *, keep: bool = False, interpret: Any = False
) -> tuple[Array, Array, Array, list[Array]]:
    """What can be joined with the softmax over other KVs of the same rows: KV heads of all sequences in turn.

    Returns:
      Output ``f32[rows, group, head_dim]``; maximum of the logits, for powers of two, and sum, ``f32[rows, group]``;
      and if they are to be kept the logits, ``f32[rows, group, kvs]``.
    """
    batch, heads, head_dim = query.shape
    pool, block_table, lengths = raw
    kv_heads, max_blocks = block_table.shape[1:]
    block_size, half = pool.shape[1], pool.shape[2] // 2
    rows, group = batch * kv_heads, heads // kv_heads
    tile = TILE_BYTES // (2 * half * pool.dtype.itemsize)
    width = -(-max_blocks * block_size // tile) * tile
    lengths = lengths.reshape(rows).astype(jnp.int32)
    work = plan_work(lengths, max_blocks * block_size, tile)
    segments = work.table.shape[0]
    query_rows = jnp.pad(query.reshape(rows, group, head_dim), ((0, 0), (0, 0), (0, half - head_dim)))

    arrived = plgpu.Barrier(num_arrivals=copies(tile, block_size), num_barriers=STAGES)
    scratch: tuple[Any, ...]
    if pool.dtype == jnp.bfloat16:
        kernel = gpu_tensor_cores.segment_kernel(head_dim**-0.5, bool(interpret))
        query_rows = jnp.pad(query_rows.astype(pool.dtype), ((0, 0), (0, QUERIES - group), (0, 0)))
        layout = tiled(pool.dtype, bool(interpret))
        scratch = (
            plgpu.SMEM((STAGES, tile, 2 * half), pool.dtype, transforms=layout),
            arrived,
            plgpu.SMEM((QUERIES, half), pool.dtype, transforms=layout),
            plgpu.SMEM((QUERIES, tile), pool.dtype, transforms=layout),
            plgpu.Barrier(),
        )
        mine, axis = gpu_tensor_cores.LAYOUT, 1  # queries lie across
        shapes = (half, QUERIES), (rows, width, QUERIES)
    else:
        kernel = gpu_cuda_cores.segment_kernel(bool(interpret))
        query_rows = query_rows.astype(jnp.float32) * (head_dim**-0.5 * math.log2(math.e))
        scratch = plgpu.SMEM((STAGES, tile, 2 * half), pool.dtype), arrived
        mine, axis = gpu_cuda_cores.LAYOUT, 0
        shapes = (QUERIES, half), (rows, group, width)
    shapes = [(segments, *shapes[0]), (segments, QUERIES), (segments, QUERIES), *shapes[1:]]
    output, maximum, total, *logits = plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[: 4 if keep else 3]),
        scratch_types=scratch,
        grid=(segments,),
        grid_names=("segment",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=LANE, reduction_scratch_bytes=4096),
        interpret=interpret,
    )(query_rows, pool, block_table.reshape(rows, max_blocks).astype(jnp.int32), work.table)
    output, maximum, total = merge(work.end, output, maximum, total, axis=axis, layout=mine, interpret=interpret)
    if axis == 1:
        output, logits = output.swapaxes(1, 2), [x.swapaxes(1, 2)[:, :group] for x in logits]
    return output[:, :group, :head_dim], maximum[:, :group], total[:, :group], logits


def check(query: Array, raw: RawKVs) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_pool(raw.pool)
    check_block_size(raw.pool)
    check_group(query, raw.block_table)


def check_group(query: Array, block_table: Array) -> None:
    """Raises ValueError for more query heads a KV head than the tensor cores' narrowest instruction takes."""
    group = query.shape[1] // block_table.shape[1]
    if not 1 <= group <= QUERIES:
        raise ValueError(f"the GPU kernels take 1 to {QUERIES} query heads a KV head, not {group=}; use 'xla'")
