"""Attention of a prompt chunk: checks the shapes and picks the implementation."""

from jax import Array

from pallas_kernels.dispatch import Implementation, backend, check_row
from pallas_kernels.kvs import RawKVs
from pallas_kernels.prefill_attention.types import ObservedQueries
from pallas_kernels.settings import operation


@operation
def prefill_attention(
    query: Array,
    key: Array,
    value: Array,
    raw: RawKVs,
    *,
    observe: ObservedQueries | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, tuple[Array, Array] | None]:
    """A chunk of queries over all KVs cached before it and, causally, over its own.

    Args:
      query: ``[batch, length, heads, head_dim]``.
      key, value: ``[batch, length, kv_heads, head_dim]``, the chunk's own; rows past a sequence's end come last, so
        causality hides them from every real query.
      raw: the KVs cached before the chunk.
      observe: whose attention to record, or None.
      implementation: see ``dispatch.Implementation``; None: the platform's own.

    Returns:
      Output ``[batch, length, heads, head_dim]`` and, with ``observe``, the masses ``f32[batch, heads, max_blocks *
      block_size]`` on the cached keys in table order and ``f32[batch, heads, length]`` on the chunk's own; else None.

    Raises:
      ValueError: shapes that don't belong together, or that this implementation can't take.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = raw.block_table.shape[1]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads: {heads=}, {kv_heads=}")
    if key.shape != (batch, length, kv_heads, head_dim) or value.shape != key.shape:
        raise ValueError(f"keys and values must match the queries: {query.shape=}, {key.shape=}, {value.shape=}")
    check_row(raw.pool, head_dim)
    if raw.block_table.shape[0] != batch or raw.lengths.shape != (batch, kv_heads):
        raise ValueError(f"batch and KV heads disagree: {query.shape=}, {raw.block_table.shape=}, {raw.lengths.shape=}")
    kernels, options = backend("prefill_attention", implementation, raw.pool, head_dim)
    return kernels.prefill_attention(query, key, value, raw, observe=observe, **options)
