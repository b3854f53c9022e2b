"""Each source's K, V, score and position end in its hole, and not a bit of anything else changes but in block 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.block_moves import Moves, move_kvs

ROWS, MAX_BLOCKS, D = 6, 20, 4
move = jax.jit(move_kvs)


def bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def case(rng, counts, *, size=16, dtype=np.float32):
    """Random contents, and in each row so many random sources, and as many holes in the blocks before them."""
    kvs = MAX_BLOCKS * size
    blocks = 1 + ROWS * MAX_BLOCKS + 5
    pool = jnp.asarray(rng.standard_normal((blocks, size, 2 * D)), dtype)
    slots = -(-blocks * size // 128) * 128
    scores = rng.standard_normal(slots).astype(np.float32).reshape(-1, 128)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    positions = rng.permutation(slots).astype(np.int32).reshape(-1, 128)
    table = 1 + rng.permutation(blocks - 1)[: ROWS * MAX_BLOCKS].reshape(ROWS, MAX_BLOCKS).astype(np.int32)
    is_source, is_hole = np.zeros((ROWS, kvs), bool), np.zeros((ROWS, kvs), bool)
    for row, count in enumerate(counts):
        blocks_needed = -(-count // size)
        end = size * rng.integers(blocks_needed, MAX_BLOCKS - blocks_needed + 1)
        is_hole[row, rng.permutation(end)[:count]] = True
        is_source[row, end + rng.permutation(kvs - end)[:count]] = True
    return pool, scores, positions, table, is_source, is_hole


def check(pool, scores, positions, table, is_source, is_hole):
    size = pool.shape[1]
    before = [bits(pool).reshape(-1, 2 * D), bits(scores).reshape(-1), bits(positions).reshape(-1)]
    wanted = [array.copy() for array in before]
    for row in range(ROWS):
        for source, hole in zip(np.flatnonzero(is_source[row]), np.flatnonzero(is_hole[row]), strict=True):
            a = table[row, source // size] * size + source % size
            b = table[row, hole // size] * size + hole % size
            for new, old in zip(wanted, before, strict=True):
                new[b] = old[a]
    got = move(pool, scores, positions, table, Moves(is_source=jnp.asarray(is_source), is_hole=jnp.asarray(is_hole)))
    for new, array in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(bits(array).reshape(new.shape)[size:], new[size:])


@given(seed=st.integers(0, 2**32 - 1), most=st.integers(0, 160))
def test_sources_end_in_holes(seed, most):
    rng = np.random.default_rng(seed)
    check(*case(rng, rng.integers(0, most + 1, ROWS)))


@pytest.mark.parametrize("total", [1, 511, 512, 513, 6 * 160])
def test_one_step_of_moves_and_more(total):
    """512 a step: just under, just one, one over, and (where blocks are full) every KV a source or a hole."""
    rng = np.random.default_rng(total)
    check(*case(rng, [total // ROWS + (row < total % ROWS) for row in range(ROWS)]))


def test_rows_without_moves_among_rows_with_many():
    check(*case(np.random.default_rng(0), [0, 160, 0, 0, 1, 0]))


def test_no_moves_at_all_change_nothing():
    pool, scores, positions, table, none, _ = case(np.random.default_rng(1), [0] * ROWS)
    moves = Moves(is_source=jnp.asarray(none), is_hole=jnp.asarray(none))
    for new, old in zip(move(pool, scores, positions, table, moves), (pool, scores, positions), strict=True):
        np.testing.assert_array_equal(bits(new), bits(old))


@pytest.mark.parametrize("size", [1, 8, 128])
def test_block_sizes(size):
    rng = np.random.default_rng(size)
    check(*case(rng, rng.integers(0, MAX_BLOCKS * size // 2 + 1, ROWS), size=size))


def test_a_bfloat16_pool():
    rng = np.random.default_rng(2)
    check(*case(rng, rng.integers(0, 100, ROWS), dtype=jnp.bfloat16))


def test_table_entries_without_moves_are_never_written():
    """Past a head's end the table may name a block of another head."""
    pool, scores, positions, table, is_source, is_hole = case(np.random.default_rng(3), [0] * ROWS)
    is_source[:, 40:60], is_hole[:, 3:23] = True, True
    table[:, 4:] = table[::-1, :1]
    check(pool, scores, positions, table, is_source, is_hole)


@pytest.mark.parametrize("wrong", ["is_source", "is_hole"])
def test_moves_that_do_not_cover_the_table_are_refused(wrong):
    marks = {"is_source": np.zeros((2, 32), bool), "is_hole": np.zeros((2, 32), bool), wrong: np.zeros((2, 30), bool)}
    moves = Moves(**{name: jnp.asarray(mark) for name, mark in marks.items()})
    values = np.zeros((1, 128))
    with pytest.raises(ValueError, match=r"cover the table.*block_table\.shape=\(2, 2\).*pool\.shape=\(5, 16, 8\)"):
        move_kvs(np.zeros((5, 16, 8)), values, values, np.zeros((2, 2), int), moves)


def test_an_unknown_implementation_is_refused():
    pool, scores, positions, table, none, _ = case(np.random.default_rng(4), [0] * ROWS)
    moves = Moves(is_source=jnp.asarray(none), is_hole=jnp.asarray(none))
    with pytest.raises(ValueError, match="'cuda'"):
        move_kvs(pool, scores, positions, table, moves, implementation="cuda")  # pyright: ignore[reportArgumentType]
