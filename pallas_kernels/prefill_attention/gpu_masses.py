"""What observed queries of a prompt chunk give to each key, on the tensor cores of NVIDIA Hopper GPUs.

A second pass over the keys, after the softmax over all of them is known: a program takes 64 keys of one head through
the observed queries.
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

from pallas_kernels.gpu_warpgroup import LANE, ROWS, laid, load, product, store, tiled
from pallas_kernels.prefill_attention.types import ObservedQueries


def masses(
    queries: Array,
    lse: Array,
    own: Array,
    pool: Array,
    block_table: Array,
    lengths: Array,
    observed: ObservedQueries,
    scale: float,
    interpret: Any,
) -> tuple[Array, Array]:
    """What the observed queries give to the cached keys and to the chunk's own, as ``api.prefill_attention`` has it.

    A key has a position and a query a limit for it: up to there it tells of keys. One pair of rules serves the cached
    keys (their place in the text), the other the chunk's own (their place in the chunk).
    """
    batch, heads, padded, half = queries.shape
    kv_heads, max_blocks = block_table.shape[1:]
    width = max_blocks * pool.shape[1]
    tiles = -(-width // ROWS)
    rows = jnp.pad(observed.rows, ((0, 0), (0, -observed.rows.shape[1] % ROWS)), constant_values=-1)
    real, rows = rows >= 0, jnp.maximum(rows, 0)
    seen = jnp.take_along_axis(queries, rows[:, None, :, None], axis=2)
    seen_lse = jnp.take_along_axis(lse, rows[:, None], axis=2)
    if observed.buffer:
        places, limits = observed.cached_positions, jnp.take_along_axis(observed.positions, rows, 1) - observed.buffer
    else:
        places, limits = jnp.zeros((batch, kv_heads, width), jnp.int32), jnp.zeros_like(rows)
    never = jnp.iinfo(jnp.int32).min
    limits = jnp.where(real[:, None], jnp.stack([limits, rows - observed.buffer], axis=1), never)
    places = jnp.pad(places, ((0, 0), (0, 0), (0, tiles * ROWS - width)))
    mine = jnp.broadcast_to(jnp.arange(padded), (batch, kv_heads, padded))
    places = jnp.concatenate([places, mine], axis=2).astype(jnp.int32)
    kind = (pool.dtype, tiled(pool.dtype, bool(interpret)))
    mass = plgpu.kernel(
        mass_kernel(heads // kv_heads, scale, half, pool.shape[1], tiles, observed.function, bool(interpret)),
        out_type=jax.ShapeDtypeStruct((batch, heads, places.shape[2]), jnp.float32),
        scratch_types=(
            plgpu.SMEM((ROWS, half), kind[0], transforms=kind[1]),
            plgpu.SMEM((ROWS, half), kind[0], transforms=kind[1]),
            plgpu.Barrier(num_arrivals=ROWS // min(ROWS, pool.shape[1])),
            plgpu.Barrier(),
        ),
        grid=(batch, heads, places.shape[2] // ROWS),
        grid_names=("batch", "head", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=LANE),
        interpret=interpret,
    )(seen, seen_lse, limits.astype(jnp.int32), places, own, pool, block_table, lengths)
    held = jnp.arange(width) < jnp.repeat(lengths, heads // kv_heads, axis=1)[..., None]
    on_own = mass[..., tiles * ROWS :][..., : observed.positions.shape[1]]
    return jnp.where(held, mass[..., :width], 0.0), on_own


def mass_kernel(
    group: int,
    scale: float,
    half: int,
    block_size: int,
    tiles: int,
    function: Callable[[Array], Array],
    interpret: bool,
) -> Callable[..., None]:
    """What the observed queries of one head give to 64 keys: cached ones in the first ``tiles`` parts, then the own."""
    scale *= math.log2(math.e)  # powers of two are one instruction each
    piece = min(ROWS, block_size)

    def each(ref: Any, index: Any, axis: int) -> Array:
        """A row of numbers, one for each query (axis 0 of the layout is reduced) or each key (axis 1)."""
        row = load(ref.at[index], plgpu.Layout.WGMMA.reduce(axis), interpret)
        return laid(lax.broadcast_in_dim(row, (ROWS, ROWS), (1 - axis,)), plgpu.Layout.WGMMA, interpret)

    def kernel(
        seen_ref: Any,  # [batch, heads, observed, half]
        lse_ref: Any,  # f32[batch, heads, observed]
        limits_ref: Any,  # i32[batch, 2, observed] on cached keys, on own keys
        places_ref: Any,  # i32[batch, kv_heads, keys]
        own_ref: Any,  # [batch, kv_heads, padded, 2 * half]
        pool_ref: Any,  # [blocks, block_size, 2 * half]
        table_ref: Any,  # i32[batch, kv_heads, max_blocks]
        lengths_ref: Any,  # i32[batch, kv_heads]
        mass_ref: Any,  # f32[batch, heads, keys]
        seen_smem: Any,  # [64, half]
        key_smem: Any,  # [64, half]
        key_arrived: Any,
        seen_arrived: Any,
    ) -> None:
        b, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
        kv_head = lax.div(head, jnp.int32(group))
        length = lengths_ref[b, kv_head]
        cached = part < tiles

        @pl.when(jnp.logical_not(cached) | (part * ROWS < length))
        def _():
            for i in range(ROWS // piece):
                target = key_smem.at[pl.ds(i * piece, piece)]

                @pl.when(cached)
                def _(i: int = i, target: Any = target):
                    start = part * ROWS + i * piece
                    held = start < length  # what is past the end may be anything, so it must be no block id
                    column = jnp.where(held, lax.div(start, jnp.int32(block_size)), 0)
                    block = jnp.where(held, table_ref[b, kv_head, column], 0)
                    inside = pl.ds(lax.rem(start, jnp.int32(block_size)), piece)
                    plgpu.copy_gmem_to_smem(pool_ref.at[block, inside, pl.ds(0, half)], target, key_arrived)

                @pl.when(jnp.logical_not(cached))
                def _(i: int = i, target: Any = target):
                    inside = pl.ds((part - tiles) * ROWS + i * piece, piece)
                    plgpu.copy_gmem_to_smem(own_ref.at[b, kv_head, inside, pl.ds(0, half)], target, key_arrived)

            plgpu.barrier_wait(key_arrived)
            keys = pl.ds(part * ROWS, ROWS)
            place = each(places_ref, (b, kv_head, keys), 1)

            def add(j: Array, mass: Array) -> Array:
                some = pl.ds(j * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(seen_ref.at[b, head, some], seen_smem, seen_arrived)
                plgpu.barrier_wait(seen_arrived)
                s = product(key_smem, seen_smem, interpret, transpose="b") * scale
                p = jnp.exp2(s - each(lse_ref, (b, head, some), 0))
                limit = each(limits_ref, (b, jnp.where(cached, 0, 1), some), 0)
                return mass + jnp.sum(jnp.where(place <= limit, function(p), 0.0), axis=1)

            mass = laid(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1), interpret)
            store(mass_ref.at[b, head, keys], lax.fori_loop(0, seen_ref.shape[2] // ROWS, add, mass), interpret)

    return kernel
