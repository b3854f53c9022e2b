"""New KVs into their slots of the pool: checks the shapes and picks the implementation."""

from jax import Array

from pallas_kernels.dispatch import Implementation, backend, check_row
from pallas_kernels.settings import operation


@operation
def write_blocks(
    pool: Array,
    key: Array,
    value: Array,
    block_table: Array,
    starts: Array,
    counts: Array,
    *,
    implementation: Implementation | None = None,
) -> Array:
    """Appends KVs to each head's blocks, in place where the pool is donated.

    Args:
      pool: ``[blocks, block_size, 2 * half]``, K beside V, each in the first ``head_dim`` values of its half.
      key, value: ``[batch, length, kv_heads, head_dim]``.
      block_table: ``i32[batch, kv_heads, max_blocks]``; the blocks that the new KVs fall in are already allocated.
      starts: ``i32[batch, kv_heads]`` index of the first new KV within its head.
      counts: ``i32[batch]`` how many of ``length`` are real; the others may go to the null block.
      implementation: see ``dispatch.Implementation``; None: the platform's own.

    Returns:
      The pool, with the new KVs in it.

    Raises:
      ValueError: shapes that don't belong together, or that this implementation can't take.
    """
    batch, _, kv_heads, head_dim = key.shape
    if value.shape != key.shape:
        raise ValueError(f"K and V must have one shape: {key.shape=}, {value.shape=}")
    check_row(pool, head_dim)
    if block_table.shape[:2] != (batch, kv_heads) or starts.shape != (batch, kv_heads) or counts.shape != (batch,):
        raise ValueError(
            f"batch and KV heads disagree: {key.shape=}, {block_table.shape=}, {starts.shape=}, {counts.shape=}"
        )
    kernels, options = backend("block_writes", implementation, pool, head_dim)
    return kernels.write_blocks(pool, key, value, block_table, starts, counts, **options)
