"""Survivors of an eviction into the holes that it left: picks the implementation."""

from jax import Array

from pallas_kernels.block_moves.types import Moves
from pallas_kernels.dispatch import Implementation, backend
from pallas_kernels.settings import operation


@operation
def move_kvs(
    pool: Array,
    scores: Array,
    positions: Array,
    block_table: Array,
    moves: Moves,
    *,
    implementation: Implementation | None = None,
) -> tuple[Array, Array, Array]:
    """Moves KVs with their score and position, in place where the arrays are donated.

    Args:
      pool: ``[blocks, block_size, width]``.
      scores, positions: one value a token slot, in rows of 128.
      block_table: ``i32[rows, max_blocks]``.
      moves: what goes where.
      implementation: see ``dispatch.Implementation``; None: the platform's own.

    Returns:
      Pool, scores and positions after the moves.

    Raises:
      ValueError: shapes that don't belong together, or that this implementation can't take.
    """
    rows, max_blocks = block_table.shape
    if moves.is_source.shape != (rows, max_blocks * pool.shape[1]) or moves.is_hole.shape != moves.is_source.shape:
        raise ValueError(f"moves must cover the table: {block_table.shape=}, {pool.shape=}, {moves.is_source.shape=}")
    kernels, options = backend("block_moves", implementation, pool)
    return kernels.move_kvs(pool, scores, positions, block_table, moves, **options)
