"""New KVs into their slots of the pool: checks the shapes and picks the implementation."""

from typing import Literal

from jax import Array

from pallas_kernels.block_writes import reference


def write_blocks(
    pool: Array,
    key: Array,
    value: Array,
    block_table: Array,
    starts: Array,
    counts: Array,
    *,
    implementation: Literal["xla"] | None = None,
) -> Array:
    """Appends KVs to each head's blocks, in place where the pool is donated.

    Args:
      pool: ``[blocks, block_size, 2 * head_dim]``.
      key, value: ``[batch, length, kv_heads, head_dim]``.
      block_table: ``i32[batch, kv_heads, max_blocks]``; the blocks that the new KVs fall in are already allocated.
      starts: ``i32[batch, kv_heads]`` index of the first new KV within its head.
      counts: ``i32[batch]`` how many of ``length`` are real; the others go to the null block.
      implementation: ``"xla"``, or None for the platform's own.

    Returns:
      The pool, with the new KVs in it.

    Raises:
      ValueError: shapes that don't belong together.
    """
    batch, _, kv_heads, head_dim = key.shape
    if value.shape != key.shape or pool.shape[-1] != 2 * head_dim:
        raise ValueError(f"K and V must fill a pool row side by side: {pool.shape=}, {key.shape=}, {value.shape=}")
    if block_table.shape[:2] != (batch, kv_heads) or starts.shape != (batch, kv_heads) or counts.shape != (batch,):
        raise ValueError(
            f"batch and KV heads disagree: {key.shape=}, {block_table.shape=}, {starts.shape=}, {counts.shape=}"
        )
    if implementation not in (None, "xla"):
        raise ValueError(f"unknown {implementation=}; expected 'xla' or None")
    return reference.write_blocks(pool, key, value, block_table, starts, counts)
