"""Which KVs go, and what is left: against the greedy walk of the paper's Algorithm 1."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from oracles.kv_compress import evict_greedy

from jaxkv.allocator import grow
from jaxkv.eviction import evict, plan_eviction, plan_moves, sort_keys

LAYERS, BATCH, HEADS, KVS, SIZE = 2, 2, 3, 96, 16


@partial(jax.jit, static_argnames=("size", "floor"))
def plan(scores, evictable, lengths, count, size=SIZE, floor=1):
    return plan_eviction(scores, evictable, lengths, count, block_size=size, floor=floor)


def case(seed, ties=False):
    rng = np.random.default_rng(seed)
    shape = (LAYERS, BATCH, HEADS)
    lengths = rng.integers(1, KVS + 1, shape).astype(np.int32)
    scores = rng.integers(0, 5, (*shape, KVS)) if ties else rng.permutation(np.prod(shape) * KVS).reshape(*shape, KVS)
    index = np.arange(KVS)
    protected = (index >= lengths[..., None] - rng.integers(0, 40)) | (rng.random((*shape, KVS)) < rng.choice([0, 0.2]))
    evictable = (index < lengths[..., None]) & ~protected
    return rng, scores.astype(np.float32), evictable, lengths


def heads_of(array, b):
    return [array[layer, b, h] for layer in range(LAYERS) for h in range(HEADS)]


def most(evictable, lengths):
    """Blocks that the heads can give up: one more than it can pay for at ``block_size`` each after the first, less one
    that it keeps."""
    total = 0
    for can, n in zip(evictable, lengths, strict=True):
        hang, paid = (n - 1) % SIZE + 1, int(can.sum())
        blocks = 0 if paid < hang else 1 + (paid - hang) // SIZE
        total += min(blocks, -(-n // SIZE) - 1)
    return total


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1.3))
def test_the_plan_is_the_greedy_walks(seed, share):
    _, scores, evictable, lengths = case(seed)
    bound = [most(heads_of(evictable, b), heads_of(lengths, b)) for b in range(BATCH)]
    count = np.array([int(share * m) for m in bound])
    got = plan(scores, evictable, lengths, jnp.asarray(count))
    for b in range(BATCH):
        can = [e[:n].copy() for e, n in zip(heads_of(evictable, b), heads_of(lengths, b), strict=True)]
        own = [s[:n] for s, n in zip(heads_of(scores, b), heads_of(lengths, b), strict=True)]
        given_up, gone = greedy_with_floor(own, can, count[b])
        assert int(np.asarray(got.blocks)[:, b].sum()) == min(count[b], bound[b])
        assert [int(k) for k in heads_of(np.asarray(got.blocks), b)] == given_up
        for head, evicted in enumerate(heads_of(np.asarray(got.evicted), b)):
            assert set(np.flatnonzero(evicted)) == gone[head]


def greedy_with_floor(scores, evictable, count):
    """The oracle's walk where each head keeps a block: it stops a head by taking its last KVs out of the walk."""
    evictable = [e.copy() for e in evictable]
    for head, can in enumerate(evictable):
        n = len(can)
        may_lose = (-(-n // SIZE) - 2) * SIZE + (n - 1) % SIZE + 1  # KVs of all blocks but one
        order = [i for i in np.argsort(scores[head], kind="stable") if can[i]]
        can[order[max(may_lose, 0) :]] = False
    return evict_greedy(scores, evictable, SIZE, count)


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 2))
def test_ties_break_no_promise(seed, share):
    _, scores, evictable, lengths = case(seed, ties=True)
    bound = [most(heads_of(evictable, b), heads_of(lengths, b)) for b in range(BATCH)]
    count = np.array([int(share * m) for m in bound])
    got = plan(scores, evictable, lengths, jnp.asarray(count))
    blocks, evicted = np.asarray(got.blocks), np.asarray(got.evicted)
    assert blocks.sum((0, 2)).tolist() == np.minimum(count, bound).tolist()
    assert not (evicted & ~evictable).any()
    hang = (lengths - 1) % SIZE + 1
    np.testing.assert_array_equal(evicted.sum(-1), np.where(blocks > 0, (blocks - 1) * SIZE + hang, 0))
    np.testing.assert_array_equal(got.lengths, lengths - evicted.sum(-1))
    assert (np.asarray(got.lengths)[blocks > 0] % SIZE == 0).all()
    assert (np.asarray(got.lengths) > 0).all()
    for row in np.ndindex(blocks.shape):
        if evicted[row].any():
            left = scores[row][evictable[row] & ~evicted[row]]
            assert scores[row][evicted[row]].max() <= left.min(initial=np.inf)


@given(seed=st.integers(0, 2**32 - 1))
def test_sequences_do_not_influence_each_other(seed):
    _, scores, evictable, lengths = case(seed)
    count = np.array([5, 3])
    together = plan(scores, evictable, lengths, jnp.asarray(count))
    for b in range(BATCH):
        one = slice(b, b + 1)
        alone = plan(scores[:, one], evictable[:, one], lengths[:, one], jnp.asarray(count[one]))
        np.testing.assert_array_equal(alone.evicted, together.evicted[:, one])


def test_a_head_that_matters_more_keeps_more_and_scaling_all_changes_nothing():
    _, scores, _, lengths = case(11)
    lengths[:] = KVS
    evictable = np.ones(scores.shape, bool)
    count = jnp.array([12, 12])
    before = plan(scores, evictable, lengths, count)
    scaled = plan(scores * 64, evictable, lengths, count)
    np.testing.assert_array_equal(scaled.evicted, before.evicted)
    scores[0, 0, 0] += 1e6
    after = plan(scores, evictable, lengths, count)
    assert int(after.blocks[0, 0, 0]) == 0 < int(before.blocks[0, 0, 0])
    assert int(after.blocks[:, 0].sum()) == 12


def test_blocks_of_one_kv_are_a_global_top_k():
    rng = np.random.default_rng(4)
    scores = rng.permutation(LAYERS * HEADS * 40).reshape(LAYERS, 1, HEADS, 40).astype(np.float32)
    lengths = np.full((LAYERS, 1, HEADS), 40, np.int32)
    got = plan(scores, np.ones(scores.shape, bool), lengths, jnp.array([100]), size=1, floor=0)
    np.testing.assert_array_equal(got.evicted, scores < 100)


def test_equal_scores_go_by_layer_head_and_index():
    shape = (LAYERS, 1, HEADS)
    lengths = np.full(shape, 48, np.int32)
    got = plan(np.zeros((*shape, 48), np.float32), np.ones((*shape, 48), bool), lengths, jnp.array([5]))
    assert np.asarray(got.blocks).reshape(-1).tolist() == [2, 2, 1, 0, 0, 0]
    assert np.flatnonzero(np.asarray(got.evicted)[0, 0, 2]).tolist() == list(range(16))


def test_keys_sort_as_the_floats_do():
    values = np.array([-np.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, np.inf], np.float32)
    keys = np.asarray(sort_keys(jnp.asarray(values)))
    assert (np.diff(keys) >= 0).all()
    assert keys[3] == keys[4]
    assert keys[-1] < np.iinfo(np.int32).max


@given(seed=st.integers(0, 2**32 - 1))
def test_moves_fill_every_hole_from_behind_the_new_end(seed):
    _, scores, evictable, lengths = case(seed)
    got = plan(scores, evictable, lengths, jnp.array([7, 7]))
    moves = plan_moves(got, jnp.asarray(lengths))
    ends = np.asarray(got.lengths).reshape(-1)
    for row, end in enumerate(ends):
        sources, holes = (np.flatnonzero(x[row]) for x in (moves.is_source, moves.is_hole))
        assert len(sources) == len(holes)
        assert (sources >= end).all()
        assert (holes < end).all()


@pytest.fixture(scope="module")
def filled():
    """A cache of random KVs, each with a score and position of its own."""
    rng = np.random.default_rng(0)
    cache = tiny.empty_cache(batch=2, max_context=KVS)
    lengths = jnp.asarray(rng.integers(60, KVS + 1, cache.lengths.shape), jnp.int32)
    cache, granted = grow(cache, lengths, most=KVS)
    assert granted
    return replace(
        cache,
        pool=jnp.asarray(rng.standard_normal(cache.pool.shape), jnp.float32),
        scores=jnp.asarray(rng.permutation(cache.scores.size).reshape(cache.scores.shape), jnp.float32),
        positions=jnp.asarray(rng.permutation(cache.positions.size).reshape(cache.positions.shape), jnp.int32),
    )


def contents(cache, row):
    kvs = tiny.by_position(cache, cache.pool, *row)
    scores = tiny.by_position(cache, cache.scores, *row)
    return {p: (kv.tobytes(), float(scores[p])) for p, kv in kvs.items()}


def test_eviction_moves_frees_and_keeps_the_rest(filled):
    held = jnp.arange(filled.capacity) < filled.lengths[..., None]
    scores = filled.scores.reshape(-1)[filled.token_slots()]
    after = jax.jit(evict)(filled, scores, held, jnp.array([9, 4]))
    before_blocks, blocks = np.asarray(filled.blocks_held()), np.asarray(after.blocks_held())
    assert (before_blocks - blocks).sum((0, 2)).tolist() == [9, 4]
    assert int(after.num_free) == int(filled.num_free) + 13
    freed = set(np.asarray(after.free_blocks)[int(filled.num_free) : int(after.num_free)].tolist())
    tails = set()
    for row in np.ndindex(blocks.shape):
        kept = blocks[row]
        np.testing.assert_array_equal(after.block_table[row][:kept], filled.block_table[row][:kept])
        tails |= set(np.asarray(filled.block_table[row])[kept : before_blocks[row]].tolist())
        old, new = contents(filled, row), contents(after, row)
        assert new.items() <= old.items()
        if kept < before_blocks[row]:
            lost = {p: score for p, (_, score) in old.items() if p not in new}
            assert max(lost.values()) < min(score for _, score in new.values())
    assert freed == tails
