"""Rows land where a plain loop puts them, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_moves import Moves, move_kvs
from pallas_kernels.block_writes import write_blocks

SIZE, D = 16, 8


@pytest.mark.parametrize("length", [1, 37])
def test_new_kvs_land_in_their_slots_and_padding_in_the_null_block(length):
    rng = np.random.default_rng(length)
    pool = rng.standard_normal((40, SIZE, 2 * D)).astype(np.float32)
    table = (1 + rng.permutation(39)[:36]).reshape(3, 2, 6).astype(np.int32)
    starts = rng.integers(0, 6 * SIZE - length, (3, 2)).astype(np.int32)
    counts = np.array([length, 0, max(length - 5, 0)], np.int32)
    key, value = (rng.standard_normal((3, length, 2, D)).astype(np.float32) for _ in range(2))
    wanted = pool.copy()
    for b, h in np.ndindex(3, 2):
        for i in range(counts[b]):
            at = starts[b, h] + i
            wanted[table[b, h, at // SIZE], at % SIZE] = np.concatenate([key[b, i, h], value[b, i, h]])
    got = jax.jit(write_blocks)(pool, key, value, table, starts, counts)
    np.testing.assert_array_equal(got[1:], wanted[1:])


def test_a_write_of_the_wrong_shape_is_refused():
    pool, kv = jnp.zeros((4, SIZE, 2 * D)), jnp.zeros((1, 3, 2, D))
    table, starts, counts = jnp.zeros((1, 2, 2), int), jnp.zeros((1, 2), int), jnp.zeros(1, int)
    with pytest.raises(ValueError, match="one shape"):
        write_blocks(pool, kv, kv[..., :4], table, starts, counts)
    with pytest.raises(ValueError, match="disagree"):
        write_blocks(pool, kv, kv, table, starts[:, :1], counts)


@pytest.mark.parametrize("most", [0, 3, 150])
def test_survivors_end_in_the_holes_with_score_and_position(most):
    """150 a row is more than one step moves at once."""
    rng = np.random.default_rng(most)
    rows, max_blocks = 6, 20
    kvs = max_blocks * SIZE
    pool = rng.standard_normal((1 + rows * max_blocks + 5, SIZE, 2 * D)).astype(np.float32)
    table = (1 + rng.permutation(rows * max_blocks)).reshape(rows, max_blocks).astype(np.int32)
    lanes = -(-pool.shape[0] * SIZE // 128)
    scores = rng.standard_normal((lanes, 128)).astype(np.float32)
    positions = rng.integers(0, 10**6, (lanes, 128)).astype(np.int32)
    is_source, is_hole = np.zeros((rows, kvs), bool), np.zeros((rows, kvs), bool)
    wanted = [pool.copy(), scores.copy().reshape(-1), positions.copy().reshape(-1)]

    def slot(row, index):
        return table[row, index // SIZE] * SIZE + index % SIZE

    for row in range(rows):
        count = rng.integers(0, most + 1) if row else most
        holes = np.sort(rng.choice(kvs // 2, count, replace=False))
        sources = np.sort(kvs // 2 + rng.choice(kvs // 2, count, replace=False))
        is_source[row, sources], is_hole[row, holes] = True, True
        for src, dst in zip(sources, holes, strict=True):
            a, b = slot(row, src), slot(row, dst)
            wanted[0][b // SIZE, b % SIZE] = pool[a // SIZE, a % SIZE]
            wanted[1][b] = scores.reshape(-1)[a]
            wanted[2][b] = positions.reshape(-1)[a]
    moves = Moves(is_source=jnp.asarray(is_source), is_hole=jnp.asarray(is_hole))
    got = jax.jit(move_kvs)(pool, scores, positions, table, moves)
    np.testing.assert_array_equal(got[0][1:], wanted[0][1:])
    np.testing.assert_array_equal(np.asarray(got[1]).reshape(-1)[SIZE:], wanted[1][SIZE:])
    np.testing.assert_array_equal(np.asarray(got[2]).reshape(-1)[SIZE:], wanted[2][SIZE:])


def test_moves_that_do_not_cover_the_table_are_refused():
    moves = Moves(is_source=jnp.zeros((2, 30), bool), is_hole=jnp.zeros((2, 30), bool))
    with pytest.raises(ValueError, match="cover the table"):
        move_kvs(jnp.zeros((5, SIZE, 8)), jnp.zeros((1, 128)), jnp.zeros((1, 128), int), jnp.zeros((2, 2), int), moves)
