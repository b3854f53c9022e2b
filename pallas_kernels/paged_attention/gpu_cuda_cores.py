"""A segment of decode attention on the CUDA cores of a GPU: for float32, which the tensor cores would round.

128 threads take 8 KVs at once: four warps of two rows, 16 lanes to a row, 4 values to a lane.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_warpgroup import MASKED, laid, load, store
from pallas_kernels.paged_attention.gpu_segments import Segment

SLAB = 8
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((SLAB, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
KV_LAYOUT = LAYOUT.reduce(1)
DIM_LAYOUT = LAYOUT.reduce(0)


def segment_kernel(interpret: bool) -> Callable[..., None]:
    """One segment: partial output, maximum (base 2) and sum, and where it is asked for the logits."""

    def kernel(
        q_ref: Any,  # f32[rows, group, half], scaled, for powers of two
        pool_ref: Any,  # f32[blocks, block_size, 2 * half]
        table_ref: Any,  # i32[rows, max_blocks]
        work_ref: Any,  # i32[segments, 4]
        out_ref: Any,  # f32[segments, QUERIES, half], of which the group is written
        max_ref: Any,  # f32[segments, QUERIES]
        sum_ref: Any,  # f32[segments, QUERIES]
        *rest: Any,  # f32[rows, group, width] logits, if observed; then scratch
    ) -> None:
        *logits_ref, kv_smem, arrived = rest
        part = Segment.of_program(work_ref, pool_ref, table_ref, kv_smem, arrived)
        (tile, _), (_, group, half) = kv_smem.shape[1:], q_ref.shape
        slabs, heads = range(tile // SLAB), range(group)

        def place(x: Array, axis: int) -> Array:
            return laid(lax.broadcast_in_dim(x, (SLAB, half), (axis,)), LAYOUT, interpret)

        def attend(query: list[Array], start: Array, slot: Array, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            maximum, total, output = carry
            logits, held = [], []
            for r in slabs:
                key = load(kv_smem.at[slot, pl.ds(r * SLAB, SLAB), pl.ds(0, half)], LAYOUT, interpret)
                index = laid(lax.broadcasted_iota(jnp.int32, (SLAB,), 0), KV_LAYOUT, interpret)
                held.append(index < part.length - start - r * SLAB)
                logits.append([jnp.where(held[r], jnp.sum(key * place(q, 1), axis=1), MASKED) for q in query])
                for ref in logits_ref:
                    for g in heads:
                        store(ref.at[part.row, g, pl.ds(start + r * SLAB, SLAB)], logits[r][g], interpret)
            # Each of the slab's places keeps a softmax of its own; they are joined after the last tile.
            new = maximum
            for r in slabs:
                new = [jnp.maximum(new[g], logits[r][g]) for g in heads]
            decay = [jnp.exp2(maximum[g] - new[g]) for g in heads]
            total = [total[g] * decay[g] for g in heads]
            output = [output[g] * place(decay[g], 0) for g in heads]
            for r in slabs:
                value = load(kv_smem.at[slot, pl.ds(r * SLAB, SLAB), pl.ds(half, half)], LAYOUT, interpret)
                # A freed slot keeps its old bytes, and 0 * NaN is NaN: V is masked too.
                value = jnp.where(place(held[r], 0), value, 0.0)
                for g in heads:
                    p = jnp.where(held[r], jnp.exp2(logits[r][g] - new[g]), 0.0)
                    total[g] = total[g] + p
                    output[g] = output[g] + place(p, 0) * value
            return new, total, output

        @pl.when(part.tiles > 0)
        def _():
            segment = lax.axis_index("segment")
            part.begin()
            query = [load(q_ref.at[part.row, g], DIM_LAYOUT, interpret) for g in heads]
            carry = (
                [laid(jnp.full((SLAB,), MASKED, jnp.float32), KV_LAYOUT, interpret) for _ in heads],
                [laid(jnp.zeros((SLAB,), jnp.float32), KV_LAYOUT, interpret) for _ in heads],
                [laid(jnp.zeros((SLAB, half), jnp.float32), LAYOUT, interpret) for _ in heads],
            )
            maximum, total, output = part.stream(partial(attend, query), carry)
            for g in heads:
                highest = jnp.max(maximum[g], axis=0)
                weight = jnp.exp2(maximum[g] - highest)
                store(max_ref.at[segment, g], highest, interpret)
                store(sum_ref.at[segment, g], jnp.sum(total[g] * weight, axis=0), interpret)
                store(out_ref.at[segment, g], jnp.sum(output[g] * place(weight, 0), axis=0), interpret)

    return kernel
