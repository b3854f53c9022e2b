"""Decode attention over per-head block tables: checks the shapes and picks the implementation."""

from jax import Array

from pallas_kernels.dispatch import Implementation, backend, check_row
from pallas_kernels.paged_attention.types import Observe


def paged_attention(
    query: Array,
    pool: Array,
    block_table: Array,
    lengths: Array,
    *,
    observe: tuple[Observe, ...] = (),
    implementation: Implementation | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """One query a sequence against the KVs that each of its KV heads holds.

    Args:
      query: ``[batch, heads, head_dim]``; query head ``h`` reads KV head ``h // (heads // kv_heads)``.
      pool: ``[blocks, block_size, 2 * half]``, K beside V, each the first ``head_dim`` values of its half.
      block_table: ``i32[batch, kv_heads, max_blocks]``; entries past a head's last block are never read.
      lengths: ``i32[batch, kv_heads]`` KVs a head holds; a head that holds none gives zeros.
      observe: what to make of the attention probabilities; each function gives one array of the second output.
      implementation: see ``dispatch.Implementation``; None: the platform's own.

    Returns:
      Output ``[batch, heads, head_dim]``, and for each of ``observe`` a ``f32[batch, kv_heads, max_blocks *
      block_size]`` in table order, zero past a head's length.

    Raises:
      ValueError: shapes that don't belong together, or that this implementation can't take.
    """
    batch, heads, head_dim = query.shape
    kv_heads = block_table.shape[1]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads: {heads=}, {kv_heads=}")
    check_row(pool, head_dim)
    if block_table.shape[0] != batch or lengths.shape != (batch, kv_heads):
        raise ValueError(f"batch and KV heads disagree: {query.shape=}, {block_table.shape=}, {lengths.shape=}")
    kernels, options = backend("paged_attention", implementation, query, pool, block_table)
    return kernels.paged_attention(query, pool, block_table, lengths, observe=observe, **options)
