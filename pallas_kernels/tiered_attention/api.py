"""Decode attention over both tiers of quantised blocks: checks the shapes and picks the implementation."""

from jax import Array

from pallas_kernels.dispatch import Implementation, backend
from pallas_kernels.kvs import RawKVs
from pallas_kernels.quantised_block import BlockLayout
from pallas_kernels.tiered_attention.types import Significance, Tiered


def tiered_attention(
    query: Array,
    pool: Array,
    block_table: Array,
    lengths: Array,
    layout: BlockLayout,
    *,
    raw: RawKVs | None = None,
    significance: Significance | None = None,
    next_position: Array | None = None,
    implementation: Implementation | None = None,
) -> Tiered:
    """One query a sequence against the KVs that each of its KV heads holds.

    Args:
      query: ``[batch, heads, head_dim]``; query head ``h`` reads KV head ``h // (heads // kv_heads)``.
      pool: ``u32[blocks, rows, 128]``, blocks of ``layout``.
      block_table: ``i32[batch, kv_heads, max_blocks]``: a head's high blocks from the left, its low ones from the
        right; what lies between is never read.
      lengths: ``i32[2, batch, kv_heads]`` KVs in the high and in the low tier.
      layout: formats of the tiers; static.
      raw: unquantised KVs to attend to in the same softmax.
      significance: how scores grow and what a KV is worth; None leaves scores as they are.
      next_position: ``i32[batch]`` that of the token after the query; with ``significance``.
      implementation: see ``dispatch.Implementation``; None: the platform's own.

    Raises:
      ValueError: shapes that don't belong together, or that this implementation can't take.
    """
    batch, heads, head_dim = query.shape
    kv_heads = block_table.shape[1]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads: {heads=}, {kv_heads=}")
    if pool.shape[1:] != (layout.rows, 128) or head_dim != layout.head_dim:
        raise ValueError(f"the pool's blocks are not of this layout: {pool.shape=}, {head_dim=}, {layout=}")
    if block_table.shape[0] != batch or lengths.shape != (2, batch, kv_heads):
        raise ValueError(f"batch and KV heads disagree: {query.shape=}, {block_table.shape=}, {lengths.shape=}")
    if (significance is None) != (next_position is None):
        raise ValueError("significance and next_position go together")
    kernels, options = backend("tiered_attention", implementation, query, block_table, layout, raw)
    observed = {"significance": significance, "next_position": next_position}
    return kernels.tiered_attention(query, pool, block_table, lengths, layout, raw=raw, **observed, **options)
