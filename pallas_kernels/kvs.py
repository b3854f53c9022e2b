"""Unquantised KVs as the operations take them."""

from typing import NamedTuple

from jax import Array


class RawKVs(NamedTuple):
    """Those that each head of each sequence holds."""

    pool: Array
    """``[blocks, block_size, 2 * half]``, K beside V, each the first ``head_dim`` values of its half."""
    block_table: Array
    """``i32[batch, kv_heads, max_blocks]``; entries past a head's last block are never read."""
    lengths: Array
    """``i32[batch, kv_heads]`` KVs a head holds."""
