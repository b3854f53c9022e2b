"""A segment of decode attention on the tensor cores of a GPU, for bfloat16.

An instruction takes at least 64 rows on its left: far more than a head's queries, so the KVs lie there, and the (at
most eight) queries on the right. Everything is held transposed: KVs down, queries across.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_warpgroup import MASKED, iota, laid, load, product, store
from pallas_kernels.paged_attention.gpu_segments import Segment

QUERIES = 8
"""Columns of the narrowest instruction: the queries of a KV head, and zeros."""
LAYOUT = plgpu.Layout.WGMMA


def segment_kernel(scale: float, interpret: bool) -> Callable[..., None]:
    """One segment: partial output, maximum (base 2) and sum, and where it is asked for the logits."""
    scale *= math.log2(math.e)  # powers of two are one instruction each

    def down(x: Array, length: int) -> Array:
        """A value a query, repeated down ``length`` rows."""
        return laid(lax.broadcast_in_dim(x, (length, QUERIES), (1,)), LAYOUT, interpret)

    def kernel(
        q_ref: Any,  # [rows, QUERIES, half]
        pool_ref: Any,  # [blocks, block_size, 2 * half]
        table_ref: Any,  # i32[rows, max_blocks]
        work_ref: Any,  # i32[segments, 4]
        out_ref: Any,  # f32[segments, half, QUERIES]
        max_ref: Any,  # f32[segments, QUERIES]
        sum_ref: Any,  # f32[segments, QUERIES]
        *rest: Any,  # f32[rows, width, QUERIES] logits, if observed; then scratch
    ) -> None:
        *logits_ref, kv_smem, arrived, q_smem, p_smem, q_arrived = rest
        part = Segment.of_program(work_ref, pool_ref, table_ref, kv_smem, arrived)
        tile, half = kv_smem.shape[1], q_ref.shape[2]

        def attend(start: Array, slot: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, output = carry
            keys, values = (kv_smem.at[slot, :, pl.ds(side * half, half)] for side in range(2))
            left = part.length - start  # KVs of the row from here on

            @pl.when(left < tile)
            def _():
                # A freed slot keeps its old bytes, and 0 * NaN is NaN: V is blanked past the end.
                blank = laid(jnp.zeros((tile, half), kv_smem.dtype), LAYOUT, interpret)
                held = iota((tile, half), 0, interpret) < left
                values[...] = jnp.where(held, load(values, LAYOUT, interpret), blank)
                plgpu.commit_smem()

            held = iota((tile, QUERIES), 0, interpret) < left
            logits = jnp.where(held, product(keys, q_smem, interpret, transpose="b") * scale, MASKED)
            for ref in logits_ref:
                store(ref.at[part.row, pl.ds(start, tile)], logits, interpret)
            new = jnp.maximum(maximum, jnp.max(logits, axis=0))
            decay = jnp.exp2(maximum - new)
            p = jnp.where(held, jnp.exp2(logits - down(new, tile)), 0.0)
            total = total * down(decay, tile) + p
            rounded = p.astype(kv_smem.dtype)
            if interpret:
                p_smem[...] = rounded.T
            else:
                p_smem.transpose((1, 0))[...] = plgpu.layout_cast(rounded, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            output = product(values, p_smem, interpret, transpose="ab", start=output * down(decay, half))
            return new, total, output

        @pl.when(part.tiles > 0)
        def _():
            segment = lax.axis_index("segment")
            plgpu.copy_gmem_to_smem(q_ref.at[part.row], q_smem, q_arrived)
            part.begin()
            plgpu.barrier_wait(q_arrived)
            carry = (
                laid(jnp.full((QUERIES,), MASKED, jnp.float32), LAYOUT.reduce(0), interpret),
                laid(jnp.zeros((tile, QUERIES), jnp.float32), LAYOUT, interpret),
                laid(jnp.zeros((half, QUERIES), jnp.float32), LAYOUT, interpret),
            )
            maximum, total, output = part.stream(attend, carry)
            store(max_ref.at[segment], maximum, interpret)
            store(sum_ref.at[segment], jnp.sum(total, axis=0), interpret)
            store(out_ref.at[segment], output, interpret)

    return kernel
