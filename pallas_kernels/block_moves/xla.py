"""Survivors into the holes, in plain XLA: the moves of all rows as one flat list, some hundred at a time.

The loop's bound is data, so the cost follows the KVs that move.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_moves.types import Moves
from pallas_kernels.pool_values import IN_BOUNDS

MOVES_A_STEP = 512


def move_kvs(
    pool: Array, scores: Array, positions: Array, block_table: Array, moves: Moves
) -> tuple[Array, Array, Array]:
    """See ``api.move_kvs``."""
    block_size = pool.shape[1]
    lanes = scores.shape[1]
    source, count = ranked_slots(moves.is_source, block_table, block_size)
    hole, _ = ranked_slots(moves.is_hole, block_table, block_size)

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        pool, scores, positions = state
        at = i * MOVES_A_STEP
        exists = at + jnp.arange(MOVES_A_STEP, dtype=jnp.int32) < count
        src = jnp.where(exists, lax.dynamic_slice(source, (at,), (MOVES_A_STEP,)), 0)
        dst = jnp.where(exists, lax.dynamic_slice(hole, (at,), (MOVES_A_STEP,)), 0)  # else the null block

        def move(array: Array, width: int) -> Array:
            moved = array.at[src // width, src % width].get(mode=IN_BOUNDS)
            return array.at[dst // width, dst % width].set(moved, mode=IN_BOUNDS)

        return move(pool, block_size), move(scores, lanes), move(positions, lanes)

    return lax.fori_loop(0, -(-count // MOVES_A_STEP), step, (pool, scores, positions))


def ranked_slots(marked: Array, block_table: Array, block_size: int) -> tuple[Array, Array]:
    """Token slots of the marked KVs, row after row, and how many there are; padded to a whole number of steps.

    At most half of all KVs are marked, since each that moves has a hole of its own.
    """
    rows, kvs = marked.shape
    flat = marked.reshape(-1)
    rank = jnp.cumsum(flat, dtype=jnp.int32) - 1
    slots = block_table[:, :, None] * block_size + jnp.arange(block_size, dtype=jnp.int32)
    size = -(-(rows * kvs // 2) // MOVES_A_STEP) * MOVES_A_STEP
    where = jnp.where(flat, rank, size)
    return jnp.zeros(size, jnp.int32).at[where].set(slots.reshape(-1), mode="drop"), rank[-1] + 1
