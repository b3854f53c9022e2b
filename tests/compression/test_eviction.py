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
from oracles.kv_compress import evict_greedy, evict_threshold

from jaxkv.cache.contents import contents as read
from jaxkv.cache.home import GONE, RAW
from jaxkv.cache.moves import Goal, move, moves_of
from jaxkv.compression.evict import plan_eviction
from jaxkv.compression.ranking import sort_keys, take_cheapest

LAYERS, BATCH, HEADS, KVS, SIZE = 2, 2, 3, 96, 16


@partial(jax.jit, static_argnames=("size", "floor"))
def plan(scores, evictable, lengths, count, size=SIZE, floor=1):
    return plan_eviction(scores, evictable, lengths, count, block_size=size, floor=floor)


TIED = np.array([-np.inf, -2.5, -0.0, 0.0, 1.0, 3.0, np.inf], np.float32)


def case(seed, ties=False):
    """Distinct scores, half of them negative, or many equal ones; heads of any length, none included."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, BATCH, HEADS)
    total = np.prod(shape) * KVS
    lengths = rng.integers(0, KVS + 1, shape).astype(np.int32)
    scores = rng.choice(TIED, (*shape, KVS)) if ties else (rng.permutation(total) - total // 2).reshape(*shape, KVS)
    index = np.arange(KVS)
    protected = (index >= lengths[..., None] - rng.integers(0, 40)) | (rng.random((*shape, KVS)) < rng.choice([0, 0.2]))
    evictable = (index < lengths[..., None]) & ~protected
    return rng, scores.astype(np.float32), evictable, lengths


def heads_of(array, b):
    return [array[layer, b, h] for layer in range(LAYERS) for h in range(HEADS)]


def most(evictable, lengths, floor=1):
    """Blocks that the heads can give up: one more than it can pay for at ``block_size`` each after the first, less
    those that it keeps."""
    total = 0
    for can, n in zip(evictable, lengths, strict=True):
        hang, paid = (n - 1) % SIZE + 1, int(can.sum())
        blocks = 0 if paid < hang else 1 + (paid - hang) // SIZE
        total += max(0, min(blocks, -(-n // SIZE) - floor))
    return total


@pytest.mark.parametrize("floor", [0, 1, 2])
@pytest.mark.parametrize("ties", [False, True])
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1.3))
def test_the_plan_is_the_greedy_walks(ties, floor, seed, share):
    """And the sort's, which is another way to the same blocks and the same KVs, whatever scores are equal."""
    _, scores, evictable, lengths = case(seed, ties)
    bound = [most(heads_of(evictable, b), heads_of(lengths, b), floor) for b in range(BATCH)]
    count = np.array([int(share * m) for m in bound])
    got = plan(scores, evictable, lengths, jnp.asarray(count), floor=floor)
    blocks, evicted = np.asarray(got.blocks), np.asarray(got.evicted)
    for b in range(BATCH):
        can = [e[:n].copy() for e, n in zip(heads_of(evictable, b), heads_of(lengths, b), strict=True)]
        own = [s[:n] for s, n in zip(heads_of(scores, b), heads_of(lengths, b), strict=True)]
        may_go = with_floor(own, can, floor)
        given_up, gone = evict_greedy(own, may_go, SIZE, count[b])
        assert (given_up, gone) == evict_threshold(own, may_go, SIZE, count[b])
        assert int(blocks[:, b].sum()) == min(count[b], bound[b])
        assert [int(k) for k in heads_of(blocks, b)] == given_up
        assert [set(np.flatnonzero(e).tolist()) for e in heads_of(evicted, b)] == gone


def with_floor(scores, evictable, floor):
    """What may go where each head keeps ``floor`` blocks: a head's last KVs in the walk are taken out of it."""
    evictable = [e.copy() for e in evictable]
    for head, can in enumerate(evictable):
        n = len(can)
        may_lose = (-(-n // SIZE) - floor - 1) * SIZE + (n - 1) % SIZE + 1  # KVs of all blocks but the floor's
        order = [i for i in np.argsort(scores[head], kind="stable") if can[i]]
        can[order[max(may_lose, 0) :]] = False
    return evictable


GPUS_NAN, NEGATIVE_NAN = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)


@pytest.mark.parametrize("special", [0.0, np.nan, -np.nan, GPUS_NAN, NEGATIVE_NAN, np.inf, -np.inf])
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 2))
def test_neither_ties_nor_nan_break_a_promise(special, seed, share):
    rng, scores, evictable, lengths = case(seed, ties=True)
    scores[rng.random(scores.shape) < 0.2] = special
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
    assert (np.asarray(got.lengths)[lengths > 0] > 0).all()
    if special == 0:
        for row in np.ndindex(blocks.shape):
            if evicted[row].any():
                left = scores[row][evictable[row] & ~evicted[row]]
                assert scores[row][evicted[row]].max() <= left.min(initial=np.inf)


@pytest.mark.parametrize("count", [0, -3])
def test_nothing_goes_where_nothing_is_asked_for(count):
    _, scores, evictable, lengths = case(5)
    got = plan(scores, evictable, lengths, jnp.array([count, 2]))
    assert not np.asarray(got.evicted)[:, 0].any()
    assert (np.asarray(got.blocks)[:, 0] == 0).all()
    np.testing.assert_array_equal(got.lengths[:, 0], lengths[:, 0])
    assert int(got.blocks[:, 1].sum()) == 2


def test_a_sequence_whose_every_kv_is_protected_gives_nothing():
    _, scores, evictable, lengths = case(5)
    evictable[:, 1] = False
    got = plan(scores, evictable, lengths, jnp.array([2, 99]))
    assert np.asarray(got.blocks).sum((0, 2)).tolist() == [2, 0]
    assert not np.asarray(got.evicted)[:, 1].any()


def test_scores_of_what_may_not_go_are_never_looked_at():
    """Nor those past a head's length."""
    rng, scores, evictable, lengths = case(8)
    count = jnp.array([4, 6])
    clean = plan(scores, evictable, lengths, count)
    garbage = rng.choice(np.array([np.nan, -np.inf, np.inf, 0.0], np.float32), scores.shape)
    dirty = plan(np.where(evictable, scores, garbage), evictable, lengths, count)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert int(clean.blocks.sum()) == 10


@pytest.mark.parametrize("ties", [False, True])
@given(seed=st.integers(0, 2**32 - 1))
def test_sequences_do_not_influence_each_other(ties, seed):
    _, scores, evictable, lengths = case(seed, ties)
    count = np.array([5, 3])
    together = plan(scores, evictable, lengths, jnp.asarray(count))
    for b in range(BATCH):
        one = slice(b, b + 1)
        alone = plan(scores[:, one], evictable[:, one], lengths[:, one], jnp.asarray(count[one]))
        for field in ("evicted", "lengths", "blocks"):
            np.testing.assert_array_equal(getattr(alone, field), getattr(together, field)[:, one])


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


@given(seed=st.integers(0, 2**32 - 1), factor=st.sampled_from([2.0, 8.0, 1e3]))
def test_scaling_one_head_moves_evictions_to_the_others(seed, factor):
    rng, scores, evictable, lengths = case(seed)
    scores = np.abs(scores)
    count = np.array([most(heads_of(evictable, b), heads_of(lengths, b)) // 2 for b in range(BATCH)])
    before = np.asarray(plan(scores, evictable, lengths, jnp.asarray(count)).blocks)
    layer, head = int(rng.integers(LAYERS)), int(rng.integers(HEADS))
    scores[layer, :, head] *= factor
    change = np.asarray(plan(scores, evictable, lengths, jnp.asarray(count)).blocks) - before
    own = change[layer, :, head].copy()
    assert (own <= 0).all()
    change[layer, :, head] = 0
    assert (change >= 0).all()
    np.testing.assert_array_equal(change.sum((0, 2)), -own)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 260))
def test_blocks_of_one_kv_are_a_global_top_k(seed, count):
    """With ties, by layer, head and place."""
    rng = np.random.default_rng(seed)
    total = LAYERS * HEADS * 40
    scores = rng.integers(-30, 30, total).astype(np.float32)
    lengths = np.full((LAYERS, 1, HEADS), 40, np.int32)
    shape = (LAYERS, 1, HEADS, 40)
    got = plan(scores.reshape(shape), np.ones(shape, bool), lengths, jnp.array([count]), size=1, floor=0)
    wanted = np.zeros(total, bool)
    wanted[np.argsort(scores, kind="stable")[:count]] = True
    np.testing.assert_array_equal(np.asarray(got.evicted).reshape(-1), wanted)


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


def test_what_is_no_number_has_a_key_between_what_comes_first_and_what_stays():
    values = np.array([GPUS_NAN, np.nan, np.inf, -np.inf, -np.nan, NEGATIVE_NAN], np.float32)
    keys = np.asarray(sort_keys(jnp.asarray(values)))
    assert ((keys > np.iinfo(np.int32).min) & (keys < np.iinfo(np.int32).max)).all()
    assert take_cheapest(jnp.asarray(keys)[None], jnp.array([6])).all()


@given(seed=st.integers(0, 2**32 - 1))
def test_moves_fill_every_hole_from_behind_the_new_end(seed):
    _, scores, evictable, lengths = case(seed)
    got = plan(scores, evictable, lengths, jnp.array([7, 7]))
    held = jnp.arange(KVS) < jnp.asarray(lengths)[..., None]
    kept, moves = moves_of(held & ~got.evicted)
    np.testing.assert_array_equal(kept, got.lengths)
    ends = np.asarray(got.lengths).reshape(-1)
    for row, end in enumerate(ends):
        sources, holes = (np.flatnonzero(x[row]) for x in (moves.is_source, moves.is_hole))
        assert len(sources) == len(holes)
        assert (sources >= end).all()
        assert (holes < end).all()
        evicted = np.asarray(got.evicted).reshape(-1, KVS)[row]
        survivors = np.flatnonzero(~evicted & (np.arange(KVS) < lengths.reshape(-1)[row]))
        kept = np.setdiff1d(np.arange(end), holes)
        np.testing.assert_array_equal(np.sort(np.concatenate([kept, sources])), survivors)


@pytest.fixture(scope="module")
def filled():
    """A cache of random KVs, each with a score and position of its own."""
    rng = np.random.default_rng(0)
    cache = tiny.empty_cache(batch=2, max_context=KVS)
    lengths = jnp.asarray(rng.integers(60, KVS + 1, cache.lengths.shape), jnp.int32)
    tables, granted = cache.raw.tables.grow(lengths[..., None], most=KVS)
    assert granted
    raw = replace(
        cache.raw,
        pool=jnp.asarray(rng.standard_normal(cache.raw.pool.shape), jnp.float32),
        scores=jnp.asarray(rng.permutation(cache.raw.scores.size).reshape(cache.raw.scores.shape), jnp.float32),
        positions=jnp.asarray(rng.permutation(cache.raw.positions.size).reshape(cache.raw.positions.shape), jnp.int32),
        tables=tables,
    )
    return replace(cache, raw=raw)


@jax.jit
def evicted_once(cache, scores, evictable, evict_blocks):
    planned = plan_eviction(scores, evictable, cache.raw.lengths, evict_blocks, block_size=SIZE)
    now = read(cache)
    home = jnp.where(now.held & ~planned.evicted, RAW, GONE)
    return move(cache, now, Goal(home=home, positions=now.positions))


def contents(cache, row):
    kvs = tiny.by_position(cache, cache.raw.pool, *row)
    scores = tiny.by_position(cache, cache.raw.scores, *row)
    return {p: (kv.tobytes(), float(scores[p])) for p, kv in kvs.items()}


def test_eviction_moves_frees_and_keeps_the_rest(filled):
    held = jnp.arange(filled.capacity) < filled.lengths[..., None]
    scores = filled.raw.scores.reshape(-1)[tiny.token_slots(filled)]
    after = evicted_once(filled, scores, held, jnp.array([9, 4]))
    chosen = np.asarray(plan(scores, held, filled.lengths, jnp.array([9, 4])).evicted)
    slots, positions = np.asarray(tiny.token_slots(filled)), np.asarray(filled.raw.positions).reshape(-1)
    before_blocks, blocks = tiny.blocks_held(filled), tiny.blocks_held(after)
    assert (before_blocks - blocks).sum((0, 2)).tolist() == [9, 4]
    assert int(after.raw.tables.free.count) == int(filled.raw.tables.free.count) + 13
    freed = set(
        np.asarray(after.raw.tables.free.blocks)[
            int(filled.raw.tables.free.count) : int(after.raw.tables.free.count)
        ].tolist()
    )
    tails = set()
    for row in np.ndindex(blocks.shape):
        kept = blocks[row]
        np.testing.assert_array_equal(
            after.raw.tables.block_table[row][:kept], filled.raw.tables.block_table[row][:kept]
        )
        tails |= set(np.asarray(filled.raw.tables.block_table[row])[kept : before_blocks[row]].tolist())
        old, new = contents(filled, row), contents(after, row)
        assert len(new) == int(after.lengths[row])
        gone = set(positions[slots[row]][chosen[row]].tolist())
        assert new == {p: kv for p, kv in old.items() if p not in gone}
        if kept < before_blocks[row]:
            lost = {p: score for p, (_, score) in old.items() if p not in new}
            assert max(lost.values()) < min(score for _, score in new.values())
    assert freed == tails
    assert len(freed) == 13


def test_eviction_touches_no_slot_but_its_holes(filled):
    held = jnp.arange(filled.capacity) < filled.lengths[..., None]
    scores = filled.raw.scores.reshape(-1)[tiny.token_slots(filled)]
    count = jnp.array([9, 4])
    after = evicted_once(filled, scores, held, count)
    planned = plan(scores, held, filled.lengths, count)
    new_end = np.asarray(planned.lengths)[..., None]
    holes = np.asarray(tiny.token_slots(filled))[np.asarray(planned.evicted) & (np.arange(filled.capacity) < new_end)]
    untouched = np.ones(filled.raw.pool.shape[0] * SIZE, bool)
    untouched[holes] = False
    untouched[:SIZE] = False  # the null block
    for name in ("pool", "scores", "positions"):
        old, new = (np.asarray(getattr(c.raw, name)) for c in (filled, after))
        old, new = (x.reshape(-1, x.shape[-1]) if name == "pool" else x.reshape(-1) for x in (old, new))
        np.testing.assert_array_equal(new[: len(untouched)][untouched], old[: len(untouched)][untouched])
    assert len(holes) > 0
    np.testing.assert_array_equal(after.num_tokens, filled.num_tokens)


def test_asking_for_nothing_changes_nothing(filled):
    held = jnp.arange(filled.capacity) < filled.lengths[..., None]
    scores = filled.raw.scores.reshape(-1)[tiny.token_slots(filled)]
    after = evicted_once(filled, scores, held, jnp.array([0, 0]))
    jax.tree.map(np.testing.assert_array_equal, after, filled)


def test_garbage_past_the_heads_ends_does_not_reach_an_eviction(filled):
    held = jnp.arange(filled.capacity) < filled.lengths[..., None]
    scores = filled.raw.scores.reshape(-1)[tiny.token_slots(filled)]
    place = np.arange(filled.raw.tables.block_table.shape[-1])
    past = place >= tiny.blocks_held(filled)[..., None]
    assert past.any()
    other = np.broadcast_to(np.asarray(filled.raw.tables.block_table)[..., :1][:, ::-1], past.shape)
    garbage = np.where(past, other, filled.raw.tables.block_table)
    poisoned = tiny.with_tables(filled, block_table=jnp.asarray(garbage, jnp.int32))
    clean, dirty = (evicted_once(cache, scores, held, jnp.array([9, 4])) for cache in (filled, poisoned))
    for row in np.ndindex(filled.lengths.shape):
        assert contents(dirty, row) == contents(clean, row)
    stack = int(clean.raw.tables.free.count)
    assert int(dirty.raw.tables.free.count) == stack
    np.testing.assert_array_equal(dirty.raw.tables.free.blocks[:stack], clean.raw.tables.free.blocks[:stack])


def test_evicting_growing_and_evicting_again_keeps_each_heads_best(filled):
    """The second time the table order is no longer that of the text."""
    cache, best = filled, {row: contents(filled, row) for row in np.ndindex(filled.lengths.shape)}
    for count in ([9, 4], [3, 7]):
        held = jnp.arange(cache.capacity) < cache.lengths[..., None]
        scores = cache.raw.scores.reshape(-1)[tiny.token_slots(cache)]
        before = cache
        cache = evicted_once(cache, scores, held, jnp.array(count))
        lost = (tiny.blocks_held(before) - tiny.blocks_held(cache)).sum((0, 2))
        assert lost.tolist() == count
        tables, granted = cache.raw.tables.grow(cache.raw.tables.lengths, most=SIZE)
        cache = replace(cache, raw=replace(cache.raw, tables=tables))
        assert granted
    for row, kvs in best.items():
        left = contents(cache, row)
        wanted = sorted(kvs, key=lambda p: kvs[p][1])[len(kvs) - len(left) :]
        assert left == {p: kvs[p] for p in wanted}
