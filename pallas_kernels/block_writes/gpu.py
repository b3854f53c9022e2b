"""New KVs into their slots, for NVIDIA Hopper GPUs: in place, row by row, moved by the copy engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_warpgroup import LANE, check_in_place, check_pool

ROWS = 16
"""KVs of one head that a program writes, unless there is but one."""


def write_blocks(
    pool: Array,
    key: Array,
    value: Array,
    block_table: Array,
    starts: Array,
    counts: Array,
    *,
    interpret: Any = False,
) -> Array:
    """See ``api.write_blocks``; KVs past ``counts`` are written nowhere. ``interpret`` takes ``InterpretGPUParams``."""
    batch, length, kv_heads, head_dim = key.shape
    half = pool.shape[2] // 2
    rows = ROWS if length > 1 else 1
    padded = -(-length // rows) * rows
    pad = ((0, 0), (0, padded - length), (0, 0), (0, half - head_dim))
    kernel = plgpu.kernel(
        write_kernel(rows, half, pool.shape[1]),
        scratch_types=(
            plgpu.SMEM((2, rows, half), pool.dtype),
            plgpu.Barrier(num_arrivals=2),
        ),
        grid=(batch, kv_heads, padded // rows),
        grid_names=("batch", "head", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        interpret=interpret,
    )
    ref = jax.new_ref(pool)
    kernel(
        ref,
        jnp.pad(key.astype(pool.dtype), pad),
        jnp.pad(value.astype(pool.dtype), pad),
        block_table.astype(jnp.int32),
        starts.astype(jnp.int32),
        counts.astype(jnp.int32),
    )
    return jax.freeze(ref)


def check(pool: Array, head_dim: int) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_pool(pool)
    check_in_place()


def write_kernel(rows: int, half: int, block_size: int) -> Callable[..., None]:
    """So many KVs of one head of one sequence, K and V apart: side by side they lie only in the pool."""

    def kernel(
        pool_ref: Any,  # [blocks, block_size, 2 * half], written in place
        key_ref: Any,  # [batch, length, kv_heads, half]
        value_ref: Any,  # the same
        table_ref: Any,  # i32[batch, kv_heads, max_blocks]
        starts_ref: Any,  # i32[batch, kv_heads]
        counts_ref: Any,  # i32[batch]
        smem: Any,  # [2, rows, half]
        arrived: Any,
    ) -> None:
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        first = lax.axis_index("part") * rows
        start, count = starts_ref[b, h] + first, counts_ref[b] - first

        @pl.when(count > 0)
        def _():
            for side, source in enumerate((key_ref, value_ref)):
                plgpu.copy_gmem_to_smem(source.at[b, pl.ds(first, rows), h], smem.at[side], arrived)
            # Entries of the table past the KVs that exist may be anything: they are not even read.
            column = [lax.div(jnp.where(i < count, start + i, start), jnp.int32(block_size)) for i in range(rows)]
            block = [table_ref[b, h, c] for c in column]  # all at once, while the KVs are on their way
            plgpu.barrier_wait(arrived)
            for i in range(rows):

                @pl.when(i < count)
                def _(i: int = i):
                    slot = lax.rem(start + i, jnp.int32(block_size))
                    for side in range(2):
                        target = pool_ref.at[block[i], slot, pl.ds(side * half, half)]
                        plgpu.copy_smem_to_gmem(smem.at[side, i], target)

            plgpu.wait_smem_to_gmem(0)

    return kernel
