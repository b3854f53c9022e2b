"""New KVs into high slots, and high KVs requantised into low slots: checks the shapes and picks the implementation."""

from jax import Array

from pallas_kernels.dispatch import Implementation, backend
from pallas_kernels.quantised_block import BlockLayout
from pallas_kernels.settings import operation


@operation
def write_kvs(
    pool: Array,
    key: Array,
    value: Array,
    positions: Array,
    blocks: Array,
    offsets: Array,
    layout: BlockLayout,
    *,
    implementation: Implementation | None = None,
) -> Array:
    """Quantises KVs into slots of high blocks, with score 0; every other KV keeps its bits.

    Args:
      pool: ``u32[blocks, rows, 128]``, blocks of ``layout``; in place where it is donated.
      key, value: ``[n, head_dim]``.
      positions: ``i32[n]`` in the text.
      blocks, offsets: ``i32[n]`` where to; the null block for none. No two KVs go to one block but that.
      layout: formats of the tiers; static.
      implementation: see ``dispatch.Implementation``; None: the platform's own.

    Raises:
      ValueError: shapes that don't belong together, or that this implementation can't take.
    """
    _check(pool, blocks, layout)
    if value.shape != key.shape or key.shape != (blocks.shape[0], layout.head_dim):
        raise ValueError(f"K and V must be one vector a slot: {key.shape=}, {value.shape=}, {blocks.shape=}")
    kernels, options = backend("quantised_writes", implementation, layout)
    return kernels.write_kvs(pool, key, value, positions, blocks, offsets, layout, **options)


@operation
def lower_kvs(
    pool: Array,
    from_blocks: Array,
    from_offsets: Array,
    to_blocks: Array,
    to_offsets: Array,
    layout: BlockLayout,
    *,
    implementation: Implementation | None = None,
) -> Array:
    """Requantises KVs from high slots into low slots, from their codes alone; score and position go with them.

    Args:
      pool: ``u32[blocks, rows, 128]``; in place where it is donated.
      from_blocks, from_offsets: ``i32[n]`` slots of high blocks.
      to_blocks, to_offsets: ``i32[n]`` slots of low blocks; the null block for none. No two go to one block but that.
      layout: formats of the tiers; static.
      implementation: see ``dispatch.Implementation``; None: the platform's own.

    Raises:
      ValueError: shapes that don't belong together, or that this implementation can't take.
    """
    _check(pool, to_blocks, layout)
    kernels, options = backend("quantised_writes", implementation, layout)
    return kernels.lower_kvs(pool, from_blocks, from_offsets, to_blocks, to_offsets, layout, **options)


def _check(pool: Array, blocks: Array, layout: BlockLayout) -> None:
    if pool.shape[1:] != (layout.rows, 128):
        raise ValueError(f"the pool's blocks are not of this layout: {pool.shape=}, {layout=}")
    if blocks.ndim != 1:
        raise ValueError(f"blocks must be a list, i32[n]: {blocks.shape=}")
