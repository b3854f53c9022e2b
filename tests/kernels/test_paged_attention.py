"""Decode attention over per-head block tables, against dense attention in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import RawKVs, paged_attention
from pallas_kernels.walk import walk


def mass(p):
    return p.sum(-2)


def squared_mass(p):
    return (p * p).sum(-2)


@partial(jax.jit, static_argnames="observe")
def attend(query, pool, table, lengths, observe=mass):
    return paged_attention(query, RawKVs(pool, table, lengths), observe=observe)


def paged(rng, lengths, *, head_dim=16, block_size=16, max_blocks=None, dtype=np.float32):
    """A pool in random order, whose every slot that no KV fills is NaN, and a table with poison past the ends."""
    blocks = -(-lengths // block_size)
    max_blocks = max_blocks or blocks.max() + 3
    pool = np.full((blocks.sum() + 8, block_size, 2 * head_dim), np.nan, np.float32)
    ids = rng.permutation(len(pool) - 1) + 1
    table = rng.integers(0, len(pool), (*lengths.shape, max_blocks)).astype(np.int32)
    used = 0
    kvs = {}
    for row in np.ndindex(lengths.shape):
        n = blocks[row]
        table[row][:n] = ids[used : used + n]
        kv = rng.standard_normal((lengths[row], 2 * head_dim)).astype(np.float32)
        if dtype != np.float32:
            kv = np.asarray(jnp.asarray(kv, dtype), np.float32)
        kvs[row] = kv
        for i in range(lengths[row]):
            pool[ids[used + i // block_size], i % block_size] = kv[i]
        used += n
    return jnp.asarray(pool, dtype), jnp.asarray(table), kvs


def oracle(query, kv):
    """``[group, d]`` over ``[n, 2d]``: output and probabilities ``[group, n]``."""
    d = query.shape[-1]
    k, v = kv[:, :d].astype(np.float64), kv[:, d:].astype(np.float64)
    s = query.astype(np.float64) @ k.T / np.sqrt(d)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p @ v, p


def check(lengths, *, group=3, head_dim=16, block_size=16, max_blocks=None, dtype=np.float32, tolerance=1e-5, seed=0):
    rng = np.random.default_rng(seed)
    batch, kv_heads = lengths.shape
    pool, table, kvs = paged(rng, lengths, head_dim=head_dim, block_size=block_size, max_blocks=max_blocks, dtype=dtype)
    query = rng.standard_normal((batch, kv_heads * group, head_dim)).astype(np.float32)
    out, masses = attend(query, pool, table, jnp.asarray(lengths))
    _, squares = attend(query, pool, table, jnp.asarray(lengths), observe=squared_mass)
    for b, h in np.ndindex(lengths.shape):
        n, heads = lengths[b, h], slice(h * group, (h + 1) * group)
        assert (np.asarray(masses[b, h, n:]) == 0).all()
        if n == 0:
            assert (np.asarray(out[b, heads]) == 0).all()
            continue
        wanted, p = oracle(query[b, heads], kvs[b, h])
        np.testing.assert_allclose(out[b, heads], wanted, atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(masses[b, h, :n], p.sum(0), atol=tolerance)
        np.testing.assert_allclose(squares[b, h, :n], (p * p).sum(0), atol=tolerance)
        assert float(masses[b, h].sum()) == pytest.approx(group, rel=1e-4)


RAGGED = np.array([[0, 1, 15], [16, 17, 300], [128, 129, 7]])


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_ragged_heads_of_every_group(group):
    check(RAGGED, group=group, seed=group)


@pytest.mark.parametrize("block_size", [1, 8, 32, 128])
def test_block_sizes(block_size):
    check(RAGGED, block_size=block_size, seed=block_size)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims(head_dim):
    check(RAGGED[:2], head_dim=head_dim, seed=head_dim)


def test_one_full_head_among_nearly_empty_ones():
    check(np.array([[2000, 1, 0, 3], [0, 2, 1, 1]]), max_blocks=200)


def test_all_heads_empty():
    check(np.zeros((2, 2), int), max_blocks=4)


def test_more_segments_than_one_step_takes():
    check(np.random.default_rng(5).integers(100, 700, (5, 3)))


def test_a_bfloat16_pool():
    check(RAGGED, dtype=jnp.bfloat16, tolerance=2e-2)


def test_recording_changes_no_bit_of_the_output():
    rng = np.random.default_rng(1)
    pool, table, _ = paged(rng, RAGGED)
    query = rng.standard_normal((3, 9, 16)).astype(np.float32)
    observed, _ = attend(query, pool, table, jnp.asarray(RAGGED))
    plain, none = attend(query, pool, table, jnp.asarray(RAGGED), observe=None)
    assert none is None
    np.testing.assert_array_equal(observed, plain)


def test_where_blocks_lie_does_not_matter():
    rng = np.random.default_rng(2)
    pool, table, _ = paged(rng, RAGGED)
    query = rng.standard_normal((3, 9, 16)).astype(np.float32)
    order = rng.permutation(len(pool))
    moved = jnp.asarray(np.asarray(pool)[np.argsort(order)])
    one = attend(query, pool, table, jnp.asarray(RAGGED))
    other = attend(query, moved, jnp.asarray(order[np.asarray(table)], jnp.int32), jnp.asarray(RAGGED))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_work_follows_resident_blocks_not_the_tables_width():
    """A wide table of short heads takes no more steps than a narrow one."""
    lengths = jnp.array([1, 0, 4000, 130])
    for max_blocks in (250, 10_000):
        plan = walk(jnp.zeros((4, max_blocks), int), lengths, 16, segment_blocks=8, segments_a_step=1)
        assert int(plan.steps) == 1 + 0 + 32 + 2


@pytest.mark.parametrize(
    ("query", "pool", "table", "lengths", "message"),
    [
        ((2, 5, 16), (9, 16, 32), (2, 2, 4), (2, 2), "multiple of KV heads"),
        ((2, 6, 16), (9, 16, 30), (2, 2, 4), (2, 2), "K beside V"),
        ((2, 6, 16), (9, 16, 32), (3, 2, 4), (2, 2), "disagree"),
        ((2, 6, 16), (9, 16, 32), (2, 2, 4), (2, 3), "disagree"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(query, pool, table, lengths, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(jnp.zeros(query), RawKVs(jnp.zeros(pool), jnp.zeros(table, int), jnp.zeros(lengths, int)))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'cuda'"):
        paged_attention(
            jnp.zeros((1, 2, 8)),
            RawKVs(jnp.zeros((3, 16, 16)), jnp.zeros((1, 1, 2), int), jnp.zeros((1, 1), int)),
            implementation="cuda",  # pyright: ignore[reportArgumentType]
        )
