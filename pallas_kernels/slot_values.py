"""One value a token slot (scores, positions), in rows of 128: read and written a whole block at a time.

Block ``b`` of ``n`` slots owns the values ``b * n`` to ``(b + 1) * n``, which lie in one row. So a gather or scatter
takes an index a block, not one a slot.
"""

import jax.numpy as jnp
from jax import Array, lax


def read_blocks(values: Array, blocks: Array, block_size: int) -> Array:
    """``[..., block_size]`` of each block, ``i32[...]``, from ``[rows, 128]``."""
    return lax.gather(
        values,
        _places(values, blocks, block_size),
        lax.GatherDimensionNumbers(offset_dims=(blocks.ndim,), collapsed_slice_dims=(0,), start_index_map=(0, 1)),
        slice_sizes=(1, block_size),
        mode="promise_in_bounds",
    )


def write_blocks(values: Array, blocks: Array, new: Array, write: Array) -> Array:
    """Values with those of the blocks replaced by new, ``[..., block_size]``, where ``bool[...]`` write says so."""
    places = _places(values, blocks, new.shape[-1])
    places = jnp.where(write[..., None], places, values.shape[0])  # past the end: dropped
    return lax.scatter(
        values,
        places,
        new.astype(values.dtype),
        lax.ScatterDimensionNumbers(
            update_window_dims=(blocks.ndim,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
        ),
        mode="drop",
    )


def _places(values: Array, blocks: Array, block_size: int) -> Array:
    """Row and lane of each block's first value."""
    a_row = values.shape[1] // block_size
    return jnp.stack([blocks // a_row, blocks % a_row * block_size], axis=-1)
