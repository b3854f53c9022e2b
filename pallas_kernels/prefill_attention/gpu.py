"""Attention of a prompt chunk on the tensor cores of NVIDIA Hopper GPUs.

A program takes 128 queries of one head through all keys before them: whole tiles from the cached blocks, then the
cached KVs that fill no tile, then the chunk's own. One warpgroup fetches, two compute 64 queries each. What observed
queries give to each key is a second kernel, since it needs the softmax over all keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import choose
from pallas_kernels.gpu_warpgroup import (
    LANE,
    MASKED,
    ROWS,
    check_block_size,
    check_pool,
    iota,
    laid,
    product,
    store,
    tiled,
)
from pallas_kernels.kvs import RawKVs
from pallas_kernels.prefill_attention.gpu_masses import masses
from pallas_kernels.prefill_attention.types import ObservedQueries

COMPUTING = 2
"""Warpgroups that compute; each has as many queries as the tensor cores take rows."""
TILE = ROWS * COMPUTING
"""Keys that a step takes, as many as a program's queries: so one tile holds the diagonal."""
STAGES = 2


def prefill_attention(
    query: Array,
    key: Array,
    value: Array,
    raw: RawKVs,
    *,
    observe: ObservedQueries | None = None,
    interpret: Any = False,
) -> tuple[Array, tuple[Array, Array] | None]:
    """See ``api.prefill_attention``; ``interpret`` takes ``InterpretGPUParams``, which also allow a float32 pool."""
    batch, length, heads, head_dim = query.shape
    pool, block_table, lengths = raw
    kv_heads = block_table.shape[1]
    half = pool.shape[2] // 2
    lengths, block_table = lengths.astype(jnp.int32), block_table.astype(jnp.int32)
    padded = -(-length // TILE) * TILE
    pad = ((0, 0), (0, padded - length), (0, 0), (0, half - head_dim))
    queries = jnp.pad(query.astype(pool.dtype), pad).transpose(0, 2, 1, 3)
    own = jnp.concatenate([jnp.pad(key, pad), jnp.pad(value, pad)], axis=-1).astype(pool.dtype).transpose(0, 2, 1, 3)
    rest = jnp.concatenate([cached_tail(pool, block_table, lengths), own], axis=2)
    scratch = (
        plgpu.SMEM((COMPUTING, ROWS, half), pool.dtype, transforms=tiled(pool.dtype, bool(interpret))),
        plgpu.SMEM((STAGES, TILE, 2 * half), pool.dtype, transforms=tiled(pool.dtype, bool(interpret))),
        plgpu.Barrier(num_barriers=COMPUTING),
        plgpu.Barrier(num_arrivals=TILE // pool.shape[1], num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=STAGES),
    )
    output, lse = plgpu.kernel(
        attend_kernel(heads // kv_heads, head_dim**-0.5, half, pool.shape[1], bool(interpret)),
        out_type=(
            jax.ShapeDtypeStruct(queries.shape, pool.dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(batch, heads, padded // TILE),
        grid_names=("batch", "head", "part"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=LANE),
        interpret=interpret,
    )(queries, pool, block_table, lengths, rest)
    output = output[:, :, :length, :head_dim].transpose(0, 2, 1, 3).astype(query.dtype)
    if observe is None:
        return output, None
    return output, masses(queries, lse, own, pool, block_table, lengths, observe, head_dim**-0.5, interpret)


def check(pool: Array, head_dim: int) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_pool(pool)
    check_block_size(pool)
    interpreted = choose("mosaic_gpu").interpret  # the interpreter takes float32 too
    if pool.dtype != jnp.bfloat16 and not interpreted:
        raise ValueError(f"the tensor cores take a pool of bfloat16, not {pool.dtype}; use implementation='xla'")


def cached_tail(pool: Array, block_table: Array, lengths: Array) -> Array:
    """The cached KVs that fill no tile, ``[batch, kv_heads, TILE, 2 * half]``, zero where there is none.

    A freed slot may hold NaN, and the tensor cores multiply it by a zero probability.
    """
    index = lengths[..., None] // TILE * TILE + jnp.arange(TILE)
    held = index < lengths[..., None]
    column = jnp.where(held, index // pool.shape[1], 0)
    block = jnp.where(held, jnp.take_along_axis(block_table, column, axis=2), 0)
    kv = pool.at[block, index % pool.shape[1]].get(mode="promise_in_bounds")
    return jnp.where(held[..., None], kv, jnp.zeros((), pool.dtype))


def attend_kernel(group: int, scale: float, half: int, block_size: int, interpret: bool) -> Callable[..., None]:
    """Output of a tile of queries, and the logarithm (base 2) of their softmax's sum."""
    scale *= math.log2(math.e)  # powers of two are one instruction each

    def rows(x: Array, width: int) -> Array:
        return lax.broadcast_in_dim(x, (ROWS, width), (0,))

    def kernel(
        query_ref: Any,  # [batch, heads, padded, half]
        pool_ref: Any,  # [blocks, block_size, 2 * half]
        table_ref: Any,  # i32[batch, kv_heads, max_blocks]
        lengths_ref: Any,  # i32[batch, kv_heads]
        rest_ref: Any,  # [batch, kv_heads, TILE + padded, 2 * half]: the cached tail, then the chunk's own
        out_ref: Any,  # [batch, heads, padded, half]
        lse_ref: Any,  # f32[batch, heads, padded]
        query_smem: Any,
        kv_smem: Any,
        query_arrived: Any,
        arrived: Any,
        consumed: Any,
    ) -> None:
        b, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
        warpgroup = lax.axis_index("warpgroup")
        kv_head = lax.div(head, jnp.int32(group))
        length = lengths_ref[b, kv_head]
        whole = lax.div(length, jnp.int32(TILE))
        tail = lax.rem(length, jnp.int32(TILE))
        skip = jnp.where(tail > 0, 0, 1)  # no tail: on with the chunk's own keys
        steps = whole + part + 2 - skip

        @pl.when(warpgroup == COMPUTING)
        def _fetch():
            if not interpret:
                plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, steps + STAGES)  # the last turns only see out what is still being read
            def _(k: Array):
                slot = lax.rem(k, jnp.int32(STAGES))
                pl.when(k >= STAGES)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                for i in range(TILE // block_size):
                    target = kv_smem.at[slot, pl.ds(i * block_size, block_size)]

                    @pl.when(k < whole)
                    def _(i: int = i, target: Any = target):
                        block = table_ref[b, kv_head, k * (TILE // block_size) + i]
                        plgpu.copy_gmem_to_smem(pool_ref.at[block], target, arrived.at[slot])

                    @pl.when((k >= whole) & (k < steps))
                    def _(i: int = i, target: Any = target):
                        start = (k - whole + skip) * TILE + i * block_size
                        source = rest_ref.at[b, kv_head, pl.ds(start, block_size)]
                        plgpu.copy_gmem_to_smem(source, target, arrived.at[slot])

        @pl.when(warpgroup < COMPUTING)
        def _compute():
            if not interpret:
                plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(part * TILE + warpgroup * ROWS, ROWS)
            smem, loaded = query_smem.at[warpgroup], query_arrived.at[warpgroup]
            plgpu.copy_gmem_to_smem(query_ref.at[b, head, mine], smem, loaded)
            plgpu.barrier_wait(loaded)

            def step(k: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
                output, maximum, total = carry
                slot = lax.rem(k, jnp.int32(STAGES))
                plgpu.barrier_wait(arrived.at[slot])
                keys = kv_smem.at[slot, :, pl.ds(0, half)]
                s = product(smem, keys, interpret, transpose="b") * scale
                if masked:
                    tile = k - whole + skip  # 0 is the cached tail
                    causal = iota((ROWS, TILE), 0, interpret) + (warpgroup * ROWS + (part + 1 - tile) * TILE)
                    last = jnp.where(tile == 0, tail - 1, causal)
                    s = jnp.where(iota((ROWS, TILE), 1, interpret) <= last, s, MASKED)
                new = jnp.maximum(maximum, jnp.max(s, axis=1))
                decay = jnp.exp2(maximum - new)
                p = jnp.exp2(s - rows(new, TILE))
                total = total * decay + jnp.sum(p, axis=1)
                output = output * rows(decay, half)
                values = kv_smem.at[slot, :, pl.ds(half, half)]
                output = product(p.astype(kv_smem.dtype), values, interpret, start=output)
                plgpu.barrier_arrive(consumed.at[slot])
                return output, new, total

            by_row = plgpu.Layout.WGMMA.reduce(1)
            carry = (
                laid(jnp.zeros((ROWS, half), jnp.float32), plgpu.Layout.WGMMA, interpret),
                laid(jnp.full((ROWS,), MASKED, jnp.float32), by_row, interpret),
                laid(jnp.zeros((ROWS,), jnp.float32), by_row, interpret),
            )
            carry = lax.fori_loop(0, whole, lambda k, c: step(k, c, False), carry)
            output, maximum, total = lax.fori_loop(whole, steps, lambda k, c: step(k, c, True), carry)
            store(lse_ref.at[b, head, mine], maximum + jnp.log2(total), interpret)
            smem[...] = (output / rows(total, half)).astype(smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, out_ref.at[b, head, mine])
            plgpu.wait_smem_to_gmem(0)

    return kernel
