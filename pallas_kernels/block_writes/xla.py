"""New KVs into their slots, in plain XLA: one scatter of rows."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.pool_values import to_rows


def write_blocks(pool: Array, key: Array, value: Array, block_table: Array, starts: Array, counts: Array) -> Array:
    """See ``api.write_blocks``."""
    length = key.shape[1]
    block_size = pool.shape[1]
    pad = ((0, 0), (0, 0), (0, 0), (0, pool.shape[2] // 2 - key.shape[3]))
    rows = jnp.concatenate([jnp.pad(key, pad), jnp.pad(value, pad)], axis=-1)
    rows = to_rows(rows.transpose(0, 2, 1, 3), pool.dtype)  # [b, h, length, 2 * half]
    index = starts[..., None] + jnp.arange(length, dtype=jnp.int32)  # [b, h, length]
    column = jnp.minimum(index // block_size, block_table.shape[2] - 1)
    real = jnp.arange(length, dtype=jnp.int32) < counts[:, None, None]
    blocks = jnp.where(real, jnp.take_along_axis(block_table, column, axis=2), 0)
    return pool.at[blocks, index % block_size].set(rows, mode="promise_in_bounds")
