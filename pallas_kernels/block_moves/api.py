"""Survivors of an eviction into the holes that it left: picks the implementation."""

from dataclasses import dataclass
from typing import Literal

import jax
from jax import Array

from pallas_kernels.block_moves import reference


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Moves:
    """Per row (a KV head of a layer of a sequence) the KVs to move; sources and destinations are disjoint.

    The ``m``-th move of a row takes the KV of its ``m``-th source to its ``m``-th hole.
    """

    is_source: Array
    """``bool[rows, kvs]``, in table order."""
    is_hole: Array
    """``bool[rows, kvs]``; as many in each row as sources."""


def move_kvs(
    pool: Array,
    scores: Array,
    positions: Array,
    block_table: Array,
    moves: Moves,
    *,
    implementation: Literal["xla"] | None = None,
) -> tuple[Array, Array, Array]:
    """Moves KVs with their score and position, in place where the arrays are donated.

    Args:
      pool: ``[blocks, block_size, 2 * head_dim]``.
      scores, positions: one value a token slot, in rows of 128.
      block_table: ``i32[rows, max_blocks]``.
      moves: what goes where.
      implementation: ``"xla"``, or None for the platform's own.

    Returns:
      Pool, scores and positions after the moves.

    Raises:
      ValueError: shapes that don't belong together.
    """
    rows, max_blocks = block_table.shape
    if moves.is_source.shape != (rows, max_blocks * pool.shape[1]) or moves.is_hole.shape != moves.is_source.shape:
        raise ValueError(f"moves must cover the table: {block_table.shape=}, {pool.shape=}, {moves.is_source.shape=}")
    if implementation not in (None, "xla"):
        raise ValueError(f"unknown {implementation=}; expected 'xla' or None")
    return reference.move_kvs(pool, scores, positions, block_table, moves)
