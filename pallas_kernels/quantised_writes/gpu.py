"""Single KVs into quantised blocks, for NVIDIA Hopper GPUs: the rows that they have bits in, patched in place.

XLA quantises, and gives the patches. A program takes one KV: no two go to one block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_warpgroup import LANE, check_in_place, load
from pallas_kernels.quantised_block import BlockLayout
from pallas_kernels.quantised_block.blocks import Tokens
from pallas_kernels.quantised_block.layout import LANES
from pallas_kernels.quantised_block.patches import Patches, patches, take


def write_kvs(
    pool: Array,
    key: Array,
    value: Array,
    positions: Array,
    blocks: Array,
    offsets: Array,
    layout: BlockLayout,
    *,
    interpret: Any = False,
) -> Array:
    """See ``api.write_kvs``; ``interpret`` takes ``InterpretGPUParams``."""
    new = Tokens(key.astype(jnp.float32), value.astype(jnp.float32), jnp.zeros(blocks.shape), positions)
    return put(pool, blocks, patches(new, offsets, layout.tiers[0]), interpret)


def lower_kvs(
    pool: Array,
    from_blocks: Array,
    from_offsets: Array,
    to_blocks: Array,
    to_offsets: Array,
    layout: BlockLayout,
    *,
    interpret: Any = False,
) -> Array:
    """See ``api.lower_kvs``; for the rest ``write_kvs``."""
    high, low = layout.tiers
    kvs = take(pool, from_blocks, from_offsets, high, layout.head_dim)
    return put(pool, to_blocks, patches(kvs, to_offsets, low), interpret)


def check(layout: BlockLayout) -> None:
    """Raises ValueError for what the kernel can't take."""
    if LANES % layout.head_dim:
        raise ValueError(
            f"the GPU kernel takes quantised heads that divide a row of {LANES} words, not {layout.head_dim}; use 'xla'"
        )
    check_in_place()


def put(pool: Array, blocks: Array, new: Patches, interpret: Any) -> Array:
    """The pool with patches in their blocks, ``i32[n]``; none in the null block."""
    # Those of one row are made one, so that all rows can be read before any is written.
    same = new.rows[:, :, None] == new.rows[:, None, :]
    masks, bits = (
        jnp.sum(jnp.where(same[..., None], x[:, None], 0), axis=2, dtype=jnp.uint32) for x in (new.masks, new.bits)
    )
    ref = jax.new_ref(pool)
    kernel = plgpu.kernel(
        put_kernel(bool(interpret)),
        grid=(blocks.shape[0],),
        grid_names=("kv",),
        # A thread stores what it loaded itself: the threads need not wait for each other.
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    kernel(ref, blocks.astype(jnp.int32), new.rows.astype(jnp.int32), ~masks, bits)
    return jax.freeze(ref)


def put_kernel(interpret: bool) -> Any:
    """One KV: its rows into registers, patched, and out."""
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)

    def kernel(
        pool_ref: Any,  # u32[blocks, rows, 128], patched in place
        blocks_ref: Any,  # i32[kvs]
        rows_ref: Any,  # i32[kvs, patches] within the block
        kept_ref: Any,  # u32[kvs, patches, 128]: bits that stay; those of a row alike
        bits_ref: Any,  # u32[kvs, patches, 128]: what the others are to be
    ) -> None:
        kv = lax.axis_index("kv")
        block = blocks_ref[kv]

        @pl.when(block > 0)
        def _():
            places = [(block, rows_ref[kv, i]) for i in range(rows_ref.shape[1])]
            found = [load(pool_ref.at[place], layout, interpret) for place in places]
            for i, place in enumerate(places):
                kept, bits = (load(ref.at[kv, i], layout, interpret) for ref in (kept_ref, bits_ref))
                pool_ref[place] = found[i] & kept | bits

    return kernel
