"""What the attention kernels are given of a layer's cached KVs."""

from typing import NamedTuple

from jax import Array


class RawKVs(NamedTuple):
    """Unquantised KVs of each sequence's heads."""

    pool: Array
    """``[blocks, block_size, 2 * half]``, K beside V, each at the beginning of its half."""
    block_table: Array
    """``i32[batch, kv_heads, max_blocks]``; entries past a head's last block are never read."""
    lengths: Array
    """``i32[batch, kv_heads]``: KVs that a head holds."""
