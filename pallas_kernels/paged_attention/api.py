"""Decode attention over per-head block tables: checks the shapes and picks the implementation."""

from typing import overload

from jax import Array

from pallas_kernels.dispatch import Implementation, backend, check_row
from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention.types import Observe, Observed, Significance, Significant, TieredKVs
from pallas_kernels.settings import operation


@overload
def paged_attention(
    query: Array,
    raw: RawKVs | None,
    *,
    tiers: TieredKVs | None = None,
    observe: None = None,
    next_position: None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, None]: ...
@overload
def paged_attention(
    query: Array, raw: RawKVs, *, observe: Observe, implementation: Implementation | None = None
) -> tuple[Array, Array]: ...
@overload
def paged_attention(
    query: Array, raw: RawKVs, *, tiers: TieredKVs, observe: Observe, implementation: Implementation | None = None
) -> tuple[Array, Observed]: ...
@overload
def paged_attention(
    query: Array,
    raw: RawKVs | None,
    *,
    tiers: TieredKVs,
    observe: Significance,
    next_position: Array,
    implementation: Implementation | None = None,
) -> tuple[Array, Significant]: ...
@operation
def paged_attention(
    query: Array,
    raw: RawKVs | None,
    *,
    tiers: TieredKVs | None = None,
    observe: Observe | Significance | None = None,
    next_position: Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array | Observed | Significant | None]:
    """One query a sequence against the KVs that each of its KV heads holds, in one softmax.

    Args:
      query: ``[batch, heads, head_dim]``; query head ``h`` reads KV head ``h // (heads // kv_heads)``.
      raw: unquantised KVs; None only beside ``tiers``.
      tiers: quantised KVs.
      observe: what to make of the attention probabilities: a function of ``raw``, with ``tiers`` of all; of ``tiers``
        alone a ``Significance``; None leaves them.
      next_position: ``i32[batch]`` that of the token after the query; with a ``Significance``.
      implementation: see ``dispatch.Implementation``; None: the platform's own.

    Returns:
      Output ``[batch, heads, head_dim]``, zeros for a head that holds no KV; and what ``observe`` comes to: of a
      function ``f32[batch, kv_heads, max_blocks * block_size]`` in table order, which mean nothing past a head's
      length, with tiers an ``Observed``; of a ``Significance`` a ``Significant``; of None, None.

    Raises:
      ValueError: arguments or shapes that don't belong together, or that this implementation can't take.
    """
    if raw is not None:
        _check_table(query, raw.block_table, raw.lengths.shape)
        check_row(raw.pool, query.shape[-1])
    if tiers is None:
        if raw is None:
            raise ValueError("nothing to attend to: give raw KVs, tiers, or both")
        if isinstance(observe, Significance) or next_position is not None:
            raise ValueError("a Significance, and next_position with it, is of quantised KVs: give tiers")
        kernels, options = backend("paged_attention", implementation, query, raw)
        return kernels.paged_attention(query, raw, observe=observe, **options)

    layout = tiers.layout
    _check_table(query, tiers.block_table, tiers.lengths.shape[:-1])
    if tiers.lengths.shape[-1] != 2:
        raise ValueError(f"lengths must be of the high and of the low tier: {tiers.lengths.shape=}")
    if tiers.pool.shape[1:] != (layout.rows, 128) or query.shape[-1] != layout.head_dim:
        raise ValueError(f"the pool's blocks are not of this layout: {tiers.pool.shape=}, {query.shape=}, {layout=}")
    if isinstance(observe, Significance) != (next_position is not None):
        raise ValueError("a Significance and next_position go together: give both or neither")
    if raw is None and observe is not None and not isinstance(observe, Significance):
        raise ValueError("a function observes raw KVs, and tiers beside them: give raw, or a Significance")
    kernels, options = backend("paged_attention", implementation, query, raw, tiers, part="_tiers")
    return kernels.paged_attention(query, raw, tiers, observe=observe, next_position=next_position, **options)


def _check_table(query: Array, block_table: Array, held: tuple[int, ...]) -> None:
    (batch, heads, _), kv_heads = query.shape, block_table.shape[1]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads: {heads=}, {kv_heads=}")
    if block_table.shape[0] != batch or held != (batch, kv_heads):
        raise ValueError(
            f"batch and KV heads disagree: {query.shape=}, {block_table.shape=}, and lengths of {held} heads"
        )
