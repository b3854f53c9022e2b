"""New KVs land where a plain loop puts them, and not a bit of anything else changes but in the null block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.block_writes import write_blocks

BATCH, HEADS, D = 3, 2, 8
write = jax.jit(write_blocks)


def bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def case(rng, *, length, size, max_blocks, dtype=np.float32):
    """A pool of random KVs, NaN in its null block, and tables that share no block but past their heads' ends."""
    blocks = 1 + BATCH * HEADS * max_blocks
    pool = rng.standard_normal((blocks, size, 2 * D)).astype(np.float32)
    pool[0] = np.nan
    table = 1 + rng.permutation(blocks - 1).reshape(BATCH, HEADS, max_blocks)
    key, value = (rng.standard_normal((BATCH, length, HEADS, D)).astype(np.float32) for _ in range(2))
    return jnp.asarray(pool, dtype), key, value, table.astype(np.int32)


def check(pool, key, value, table, starts, counts):
    """Poisons the entries that no real KV falls in: a write there would change another head's block."""
    size = pool.shape[1]
    rows = np.asarray(jnp.asarray(np.concatenate([key, value], -1)).astype(pool.dtype))
    wanted = np.array(pool)
    poisoned = np.array(table)
    for b, h in np.ndindex(BATCH, HEADS):
        for i in range(counts[b]):
            at = starts[b, h] + i
            wanted[table[b, h, at // size], at % size] = rows[b, i, h]
        poisoned[b, h, -(-(starts[b, h] + counts[b]) // size) :] = table[(b + 1) % BATCH, h, 0]
    got = write(pool, key, value, jnp.asarray(poisoned), jnp.asarray(starts), jnp.asarray(counts))
    np.testing.assert_array_equal(bits(got)[1:], bits(wanted)[1:])
    return wanted


@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize(("length", "size"), [(1, 16), (37, 16), (37, 8), (5, 128), (3, 1)])
def test_rows_land_where_a_loop_puts_them(length, size, seed):
    rng = np.random.default_rng(seed)
    max_blocks = 2 + -(-length // size)
    pool, key, value, table = case(rng, length=length, size=size, max_blocks=max_blocks)
    starts = rng.integers(0, max_blocks * size - length + 1, (BATCH, HEADS)).astype(np.int32)
    counts = rng.integers(0, length + 1, BATCH).astype(np.int32)
    check(pool, key, value, table, starts, counts)


def test_a_write_from_the_middle_of_a_block_runs_over_several():
    rng = np.random.default_rng(0)
    pool, key, value, table = case(rng, length=20, size=8, max_blocks=4)
    starts = np.array([[7, 1], [8, 0], [12, 5]], np.int32)  # over 2, 3 and 4 blocks; to the very last slot
    wanted = check(pool, key, value, table, starts, np.array([20, 20, 20], np.int32))
    np.testing.assert_array_equal(wanted[table[0, 0, 0], 7], np.concatenate([key[0, 0, 0], value[0, 0, 0]]))
    np.testing.assert_array_equal(wanted[table[2, 0, 3], 7], np.concatenate([key[2, 19, 0], value[2, 19, 0]]))


def test_padding_goes_to_the_null_block_alone():
    rng = np.random.default_rng(1)
    pool, key, value, table = case(rng, length=5, size=16, max_blocks=2)
    key[:], value[:] = np.inf, np.inf
    got = write(pool, key, value, table, np.full((BATCH, HEADS), 3, np.int32), np.zeros(BATCH, np.int32))
    np.testing.assert_array_equal(bits(got)[1:], bits(pool)[1:])


def test_a_full_head_that_gets_nothing_stays_as_it_is():
    """Its start is past the table, as in a decode step of a sequence that has ended."""
    rng = np.random.default_rng(2)
    pool, key, value, table = case(rng, length=1, size=16, max_blocks=2)
    starts = np.full((BATCH, HEADS), 32, np.int32)
    starts[1] = 31
    check(pool, key, value, table, starts, np.array([0, 1, 0], np.int32))


def test_a_bfloat16_pool_takes_the_nearest_values():
    rng = np.random.default_rng(3)
    pool, key, value, table = case(rng, length=5, size=16, max_blocks=2, dtype=jnp.bfloat16)
    starts = rng.integers(0, 27, (BATCH, HEADS)).astype(np.int32)
    check(pool, key, value, table, starts, np.array([5, 2, 4], np.int32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"value": (1, 3, 2, 4)}, r"one shape.*value\.shape=\(1, 3, 2, 4\)"),
        ({"pool": (4, 16, 12)}, r"K beside V.*pool\.shape=\(4, 16, 12\)"),
        ({"table": (2, 2, 2)}, r"disagree.*block_table\.shape=\(2, 2, 2\)"),
        ({"starts": (1, 1)}, r"disagree.*starts\.shape=\(1, 1\)"),
        ({"counts": (2,)}, r"disagree.*counts\.shape=\(2,\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused_by_name(wrong, message):
    shapes = {
        "pool": (4, 16, 16),
        "key": (1, 3, 2, 8),
        "value": (1, 3, 2, 8),
        "table": (1, 2, 2),
        "starts": (1, 2),
        "counts": (1,),
        **wrong,
    }
    kinds = {"pool": float, "key": float, "value": float}
    arrays = [np.zeros(shape, kinds.get(name, int)) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        write_blocks(*arrays)


def test_an_unknown_implementation_is_refused():
    pool, key, value, table = case(np.random.default_rng(0), length=1, size=16, max_blocks=2)
    starts, counts = np.zeros((BATCH, HEADS), np.int32), np.zeros(BATCH, np.int32)
    with pytest.raises(ValueError, match="'cuda'"):
        write_blocks(pool, key, value, table, starts, counts, implementation="cuda")  # pyright: ignore[reportArgumentType]
