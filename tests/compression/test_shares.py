"""How heads share a budget: the split against a loop, and the blocks that stay against the greedy walk by group."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.kv_compress import evict_greedy
from test_eviction import BATCH, HEADS, LAYERS, SIZE, case, heads_of, most, with_floor

from jaxkv.compression.evict import plan_eviction
from jaxkv.compression.shares import Global, PerHead, PerLayer, Pyramid, apportion, even

jax_apportion = jax.jit(apportion)


@partial(jax.jit, static_argnames="shares")
def plan(scores, evictable, lengths, count, shares):
    return plan_eviction(scores, evictable, lengths, count, block_size=SIZE, shares=shares)


def split(weights, held, may_go, total):
    """The next block always goes to the group that is furthest behind its weight."""
    kept = held - may_go
    while kept.sum() < total:
        bids = np.where(kept < held, np.float32(kept + 0.5) / weights, np.inf)
        kept[bids.argmin()] += 1
    return kept


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_a_budget_is_split_by_weight(seed, share):
    rng = np.random.default_rng(seed)
    weights = rng.choice([0.05, 0.5, 1.0, 1.95], 5).astype(np.float32)
    rows = rng.random((1, 5, 2, 6)) < 0.8
    held = rng.integers(rows.sum(-1), 7)  # rows that can go, and what can't
    may_go = rows.sum((-1, -2))[0]
    count = int(share * may_go.sum())
    got = jax_apportion(weights, jnp.asarray(held), rows, jnp.array([count]))
    total = held.sum(-1)[0]
    np.testing.assert_array_equal(got[0], split(weights, total.copy(), may_go, total.sum() - count))


SHARES = {
    "global": (Global(), (LAYERS * HEADS,)),
    "layers": (PerLayer(), (HEADS,) * LAYERS),
    "heads": (PerHead(), (1,) * LAYERS * HEADS),
}


@pytest.mark.parametrize("name", SHARES)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_the_plan_is_the_greedy_walk_of_each_group(name, seed, share):
    shares, groups = SHARES[name]
    _, scores, evictable, lengths = case(seed)
    scores, evictable, lengths = scores[:, :1], evictable[:, :1], lengths[:, :1]
    own = [s[:n] for s, n in zip(heads_of(scores, 0), heads_of(lengths, 0), strict=True)]
    can = [e[:n] for e, n in zip(heads_of(evictable, 0), heads_of(lengths, 0), strict=True)]
    may_go = np.array([most([e], [len(e)]) for e in can])
    held = np.array([-(-len(s) // SIZE) for s in own])
    edges = np.cumsum([0, *groups])
    of_groups = [slice(*edge) for edge in pairwise(edges)]
    count = int(share * may_go.sum())
    totals = np.array([held[g].sum() for g in of_groups])
    limits = np.array([may_go[g].sum() for g in of_groups])
    kept = split(np.ones(len(groups), np.float32), totals, limits, held.sum() - count)

    got = plan(scores, evictable, lengths, jnp.array([count]), shares)
    assert int(got.blocks.sum()) == count
    blocks, evicted = heads_of(np.asarray(got.blocks), 0), heads_of(np.asarray(got.evicted), 0)
    for g, total, keep in zip(of_groups, totals, kept, strict=True):
        given_up, gone = evict_greedy(own[g], with_floor(own[g], can[g], 1), SIZE, total - keep)
        assert [int(k) for k in blocks[g]] == given_up
        assert [set(np.flatnonzero(e).tolist()) for e in evicted[g]] == gone


@given(seed=st.integers(0, 2**32 - 1), floor=st.sampled_from([0.2, 0.5, 1.0]))
def test_a_floor_is_each_heads_own(seed, floor):
    rng = np.random.default_rng(seed)
    kvs = 12 * SIZE
    scores = (rng.random((LAYERS, BATCH, HEADS, kvs)) * rng.random((LAYERS, BATCH, HEADS, 1)) ** 8).astype(np.float32)
    lengths = np.full((LAYERS, BATCH, HEADS), kvs, np.int32)
    count = rng.integers(0, 10 * LAYERS * HEADS, BATCH)
    for shares in (Global(floor=floor), PerLayer(floor=floor), PerLayer(floor=floor, layers=Pyramid(slope=3))):
        got = plan(scores, np.ones(scores.shape, bool), lengths, jnp.asarray(count), shares)
        left = 12 - np.asarray(got.blocks)
        assert left.sum((0, 2)).tolist() == (12 * LAYERS * HEADS - count).tolist()
        over = (0, 2) if isinstance(shares, Global) else 2
        equal = left.mean(over, keepdims=True)
        assert (left >= np.maximum(np.floor(floor * equal - 1e-4), 1)).all()


def test_a_pyramid_keeps_more_below_and_the_same_in_all():
    weights = np.asarray(Pyramid(slope=20)(30))
    assert weights.mean() == pytest.approx(1)
    assert weights[-1] == pytest.approx(1 / 20)
    assert (np.diff(weights) < 0).all()
    assert (np.asarray(even(30)) == 1).all()


@pytest.mark.parametrize("make", [lambda: Global(floor=1.5), lambda: PerHead(floor=-0.1), lambda: Pyramid(slope=0.5)])
def test_shares_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"got (1\.5|-0\.1|0\.5)"):
        make()
