"""Single KVs into quantised blocks as a TPU kernel: what is there is fetched, patched, and written back.

A copy takes whole tiles of 8 rows, so the tiles that a KV's patches fall in are the unit, each of them once. XLA
quantises and gives the patches; many KVs share a grid step, so the latency of a copy is paid once for all of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantised_block import BlockLayout
from pallas_kernels.quantised_block.blocks import Tokens
from pallas_kernels.quantised_block.layout import LANES
from pallas_kernels.quantised_block.patches import Patches, patches, take
from pallas_kernels.quantised_block.tpu_vectors import SUBLANES, check_layout
from pallas_kernels.tpu_tiles import SMEM_ENTRIES, UNCHECKED, rows_at_once
from pallas_kernels.tpu_values import floor_div

STEP_KVS = 32
"""KVs a grid step: some 6 tiles of 4 KiB each."""
TWICE = -1
"""A tile that an earlier patch of the same KV has fetched already."""


def write_kvs(
    pool: Array,
    key: Array,
    value: Array,
    positions: Array,
    blocks: Array,
    offsets: Array,
    layout: BlockLayout,
    **options: Any,
) -> Array:
    """See ``api.write_kvs``; the options are those of ``put``."""
    new = Tokens(key.astype(jnp.float32), value.astype(jnp.float32), jnp.zeros(blocks.shape), positions)
    return put(pool, blocks, patches(new, offsets, layout.tiers[0]), **options)


def lower_kvs(
    pool: Array,
    from_blocks: Array,
    from_offsets: Array,
    to_blocks: Array,
    to_offsets: Array,
    layout: BlockLayout,
    **options: Any,
) -> Array:
    """See ``api.lower_kvs``; the options are those of ``put``."""
    high, low = layout.tiers
    kvs = take(pool, from_blocks, from_offsets, high, layout.head_dim)
    return put(pool, to_blocks, patches(kvs, to_offsets, low), **options)


def check(layout: BlockLayout) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_layout(layout)


def put(
    pool: Array,
    blocks: Array,
    new: Patches,
    *,
    a_step: int = STEP_KVS,
    smem_entries: int = SMEM_ENTRIES,
    interpret: Any = False,
) -> Array:
    """The pool with patches in their blocks, ``i32[n]``; none in the null block.

    ``a_step``, KVs a grid step, and ``smem_entries`` are for tests.
    """
    kvs, each = new.rows.shape
    a_step = min(a_step, kvs)
    tiles = new.rows // SUBLANES
    same = tiles[:, :, None] == tiles[:, None, :]
    first = jnp.argmax(same, axis=2).astype(jnp.int32)  # the patch that fetches this one's tile
    fetched = jnp.where((first == jnp.arange(each)) & (blocks[:, None] > 0), tiles, TWICE)
    places = first * SUBLANES + new.rows % SUBLANES
    at_once = rows_at_once(2 * each + 1, smem_entries) // a_step * a_step
    arguments = blocks, fetched, places, new.masks, new.bits
    for at in range(0, kvs, at_once):
        pool = _run(pool, *(x[at : at + at_once] for x in arguments), a_step=a_step, interpret=interpret)
    return pool


def _run(
    pool: Array, blocks: Array, tiles: Array, places: Array, masks: Array, bits: Array, *, a_step: int, interpret: Any
) -> Array:
    """One call: tiles to fetch, and rows among those fetched to patch, ``i32[n, m]``."""
    kvs, each = tiles.shape
    pad = ((0, -kvs % a_step), (0, 0))
    tiles, places = jnp.pad(tiles, pad, constant_values=TWICE), jnp.pad(places, pad)
    masks, bits = (jnp.pad(x, (*pad, (0, 0))) for x in (masks, bits))
    of_kvs = pl.BlockSpec((a_step, each, LANES), lambda step, *_: (step, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        partial(_kernel, each=each, a_step=a_step),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiles.shape[0] // a_step,),
            in_specs=[of_kvs, of_kvs, anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((a_step, each * SUBLANES, LANES), pool.dtype),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=32 * 2**20, **UNCHECKED),
        name="quantised_writes",
        interpret=interpret,
    )(jnp.pad(blocks, pad[0]), tiles.reshape(-1), places.reshape(-1), masks, bits, pool)


def _kernel(
    blocks: Any,
    tiles: Any,
    places: Any,
    masks: Any,
    bits: Any,
    pool: Any,
    written: Any,
    buffer: Any,
    read: Any,
    wrote: Any,
    *,
    each: int,
    a_step: int,
) -> None:
    """``pool`` and ``written`` are the same memory."""
    first = pl.program_id(0) * a_step

    def each_tile(copy: Any) -> None:
        """``copy(in the pool, in the buffer)`` for each tile of the step's KVs."""

        def of_patch(i: Array, _: None) -> None:
            tile = tiles[first * each + i]

            @pl.when(tile != TWICE)
            def _():
                kv, patch = floor_div(i, each), lax.rem(i, jnp.int32(each))
                at = pl.ds(pl.multiple_of(tile * SUBLANES, SUBLANES), SUBLANES)
                here = pl.ds(pl.multiple_of(patch * SUBLANES, SUBLANES), SUBLANES)
                copy(blocks[first + kv], at, buffer.at[kv, here])

        lax.fori_loop(0, a_step * each, of_patch, None)

    def fetch(block: Array, at: Any, here: Any, *, wait: bool) -> None:
        copy = pltpu.make_async_copy(pool.at[block, at], here, read)
        copy.wait() if wait else copy.start()

    def store(block: Array, at: Any, here: Any, *, wait: bool) -> None:
        copy = pltpu.make_async_copy(here, written.at[block, at], wrote)
        copy.wait() if wait else copy.start()

    def patch(kv: Array, _: None) -> None:
        @pl.when(blocks[first + kv] > 0)
        def _():
            for index in range(each):
                row = pl.ds(places[(first + kv) * each + index], 1)
                kept = buffer[kv, row] & ~masks[kv, index : index + 1]
                buffer[kv, row] = kept | bits[kv, index : index + 1]

    each_tile(partial(fetch, wait=False))
    each_tile(partial(fetch, wait=True))
    lax.fori_loop(0, a_step, patch, None)
    each_tile(partial(store, wait=False))
    each_tile(partial(store, wait=True))
