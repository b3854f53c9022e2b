"""The oracles of budgets, selection and moves, against each other and against figures worked out by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles.attention import ragged_attention
from oracles.kv_compress import (
    after_lengths,
    apply_moves,
    compact,
    evict_count,
    evict_greedy,
    evict_threshold,
    evicted_kvs,
    hang_of,
    max_evictable,
    protected,
)

EVICTIONS = [evict_greedy, evict_threshold]


# Budget


def test_a_cap_on_tokens_counts_whole_blocks_of_the_sequence():
    lengths = np.array([[33, 16], [1, 0]])  # 3 + 1 + 1 + 0 blocks
    assert evict_count(lengths, 16, 40, max_cache_tokens=16, protected_window=1) == 1
    assert evict_count(lengths, 16, 40, max_cache_tokens=17, protected_window=1) == 0
    assert evict_count(lengths, 16, 40, max_cache_tokens=0, protected_window=1) == 5


def test_a_fraction_spares_the_window_in_whole_blocks():
    lengths = np.full((2, 2), 100)
    # 17 protected tokens are 2 blocks; of the other 68 a quarter stays: 4 * (17 + 32) of 4 * 100 KVs.
    assert evict_count(lengths, 16, 100, keep_ratio=0.25, protected_window=17) == math.ceil(4 * 51 / 16)
    assert evict_count(lengths, 16, 100, keep_ratio=1.0, protected_window=17) == 0
    assert evict_count(lengths, 16, 100, keep_ratio=0.01, protected_window=97) == 0


@pytest.mark.parametrize("forms", [{}, {"max_cache_tokens": 3, "keep_ratio": 0.5}])
def test_a_budget_has_one_form(forms):
    with pytest.raises(ValueError, match="one of the two"):
        evict_count(np.ones((1, 1)), 16, 1, protected_window=1, **forms)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_the_window_counts_the_token_that_is_not_cached_yet(length, window, sinks):
    safe = protected(np.arange(length), length, window, 0)
    assert safe.sum() == min(window - 1, length)
    assert safe[length - safe.sum() :].all()
    both = protected(np.arange(length), length, window, sinks)
    np.testing.assert_array_equal(both, safe | (np.arange(length) < sinks))


@given(st.integers(1, 8), st.lists(st.integers(0, 60), min_size=1, max_size=6), st.data())
def test_what_can_go_is_the_blocks_less_those_that_protected_kvs_fill(block_size, lengths, data):
    counts = [data.draw(st.integers(0, n)) for n in lengths]
    blocks = sum(math.ceil(n / block_size) - math.ceil(p / block_size) for n, p in zip(lengths, counts, strict=True))
    assert max_evictable([lengths], block_size, [counts]) == blocks


def test_sinks_count_as_protected_wherever_they_stand():
    """16 of the window and 1 sink need 2 blocks, though the window alone would fit in one."""
    safe = protected(np.arange(64), 64, 17, 1)
    assert max_evictable([[64]], 16, [[safe.sum()]]) == 2
    assert max_evictable([[64]], 16, [[16]]) == 3
    for evict in EVICTIONS:
        assert evict([np.zeros(64)], [~safe], 16, 99)[0] == [2]


# Selection


@st.composite
def sequences(draw, distinct=None, min_blocks=0):
    """Scores and evictable KVs of each head, a block size, and how many blocks to evict."""
    block_size = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, 14), min_size=1, max_size=5))
    total = sum(lengths)
    if draw(st.booleans()) if distinct is None else distinct:
        flat = draw(st.permutations(range(total)))
    else:
        flat = draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, math.inf]), min_size=total, max_size=total))
    cuts = np.cumsum(lengths)[:-1]
    scores = np.split(np.array(flat, float), cuts)
    if draw(st.booleans()):
        window, sinks = draw(st.integers(1, 8)), draw(st.integers(0, 3))
        evictable = [~protected(np.arange(n), n, window, sinks) for n in lengths]
    else:
        evictable = np.split(np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)), bool), cuts)
    return scores, evictable, block_size, draw(st.integers(min_blocks, 12))


def bound(scores, evictable, block_size):
    return max_evictable([len(s) for s in scores], block_size, [len(e) - int(e.sum()) for e in evictable])


def padded_rows(scores, evictable, block_size, evict_blocks):
    """The paper's own form: free slots sort first, what must stay last, and a row's price is its last column."""
    rows, orders = [], []
    for head, (score, may_go) in enumerate(zip(scores, evictable, strict=True)):
        slots = math.ceil(len(score) / block_size) * block_size
        kinds = [(1, s, i) if may_go[i] else (2, 0.0, i) for i, s in enumerate(score)]
        order = sorted([(0, 0.0, -1)] * (slots - len(score)) + kinds)
        orders.append(order)
        for row in range(slots // block_size):
            kind, price, _ = order[(row + 1) * block_size - 1]
            if kind == 1:
                rows.append((price, head, row))
    k = [0] * len(scores)
    for _, head, _ in sorted(rows)[:evict_blocks]:
        k[head] += 1
    return k, [{i for _, _, i in order[: n * block_size] if i >= 0} for order, n in zip(orders, k, strict=True)]


@given(sequences(distinct=True))
def test_the_walk_and_the_sort_agree_on_distinct_scores(sequence):
    assert evict_greedy(*sequence) == evict_threshold(*sequence) == padded_rows(*sequence)


@given(sequences(distinct=False))
def test_the_walk_and_the_sort_agree_on_tied_scores(sequence):
    assert evict_greedy(*sequence) == evict_threshold(*sequence) == padded_rows(*sequence)


@pytest.mark.parametrize("evict", EVICTIONS)
@given(sequence=sequences())
def test_as_many_blocks_go_as_are_asked_for_or_can(evict, sequence):
    scores, evictable, block_size, evict_blocks = sequence
    k, gone = evict(*sequence)
    assert sum(k) == min(evict_blocks, bound(scores, evictable, block_size))
    lengths = np.array([len(s) for s in scores])
    after = after_lengths(lengths, k, block_size)
    np.testing.assert_array_equal(after, lengths - [len(indices) for indices in gone])
    for head, indices in enumerate(gone):
        assert all(evictable[head][i] for i in indices)
        assert after[head] == lengths[head] if k[head] == 0 else after[head] % block_size == 0
        assert len(indices) == evicted_kvs(len(scores[head]), k[head], block_size)
        assert math.ceil(after[head] / block_size) == math.ceil(lengths[head] / block_size) - k[head]


@pytest.mark.parametrize("evict", EVICTIONS)
@given(sequence=sequences())
def test_each_head_loses_its_lowest_and_of_equals_the_first(evict, sequence):
    scores, evictable, _, _ = sequence
    _, gone = evict(*sequence)
    for head, indices in enumerate(gone):
        order = sorted((s, i) for i, s in enumerate(scores[head]) if evictable[head][i])
        assert indices == {i for _, i in order[: len(indices)]}


@pytest.mark.parametrize("evict", EVICTIONS)
@given(sequence=sequences())
def test_blocks_of_one_keep_the_best_kvs_of_all_heads(evict, sequence):
    scores, evictable, _, evict_blocks = sequence
    k, gone = evict(scores, evictable, 1, evict_blocks)
    everything = sorted((s, h, i) for h, row in enumerate(scores) for i, s in enumerate(row) if evictable[h][i])
    assert {(h, i) for h, indices in enumerate(gone) for i in indices} == {
        (h, i) for _, h, i in everything[:evict_blocks]
    }
    assert k == [len(indices) for indices in gone]


@pytest.mark.parametrize("evict", EVICTIONS)
def test_equal_scores_empty_the_first_heads_first(evict):
    scores, evictable = [np.zeros(10)] * 3, [np.ones(10, bool)] * 3
    assert evict(scores, evictable, 4, 4) == ([3, 1, 0], [set(range(10)), {0, 1}, set()])


@pytest.mark.parametrize("evict", EVICTIONS)
def test_the_budget_is_global(evict):
    rng = np.random.default_rng(0)
    scores, evictable = list(rng.random((4, 16))), [np.ones(16, bool)] * 4
    k, _ = evict(scores, evictable, 4, 6)
    assert evict([s * 8 for s in scores], evictable, 4, 6)[0] == k
    assert evict([scores[0] * 1e3, *scores[1:]], evictable, 4, 6)[0][0] == 0


@pytest.mark.parametrize("evict", EVICTIONS)
def test_a_short_last_block_is_the_cheapest_to_give(evict):
    scores = [np.array([3.0, 1.0, 5.0, 4.0, 2.0]), np.array([1.5, 1.6, 6.0, 7.0])]
    assert evict(scores, [np.ones(5, bool), np.ones(4, bool)], 4, 1) == ([1, 0], [{1}, set()])


@pytest.mark.parametrize("evict", EVICTIONS)
def test_a_score_that_is_no_number_is_refused(evict):
    with pytest.raises(ValueError, match="NaN"):
        evict([np.array([1.0, np.nan])], [np.ones(2, bool)], 2, 1)


@pytest.mark.parametrize("evict", EVICTIONS)
def test_no_block_asked_for_and_no_kv_held_evict_nothing(evict):
    assert evict([np.zeros(3)], [np.ones(3, bool)], 1, 0) == ([0], [set()])
    assert evict([np.zeros(3)], [np.ones(3, bool)], 1, -1) == ([0], [set()])
    assert evict([np.zeros(0)], [np.zeros(0, bool)], 4, 3) == ([0], [set()])


def test_lengths_after_keep_the_shape_of_layers_and_heads():
    after = after_lengths(np.array([[10, 8], [5, 0]]), np.array([[1, 2], [0, 0]]), 4)
    np.testing.assert_array_equal(after, [[8, 0], [5, 0]])
    assert [hang_of(n, 4) for n in (1, 4, 5, 8)] == [1, 4, 1, 4]


# Moves


@given(st.integers(0, 30), st.data())
def test_moves_fill_the_holes_from_the_tail_and_touch_nothing_else(length, data):
    evicted = data.draw(st.sets(st.integers(0, length - 1))) if length else set()
    kvs = [f"kv {i}" for i in range(length)]
    moves, new_len = compact(kvs, evicted)
    sources, destinations = [s for s, _ in moves], [d for _, d in moves]
    assert new_len == length - len(evicted)
    assert set(sources).isdisjoint(destinations)
    assert all(destination < new_len <= source for source, destination in moves)
    assert sources == sorted(set(range(new_len, length)) - evicted, reverse=True)
    assert destinations == sorted(i for i in evicted if i < new_len)
    assert len(moves) <= min(len(evicted), length - new_len)
    after = apply_moves(kvs, moves, new_len)
    assert Counter(after) == Counter(kv for i, kv in enumerate(kvs) if i not in evicted)
    assert all(after[i] == kvs[i] for i in range(new_len) if i not in evicted)
    assert after == apply_moves(kvs, moves[::-1], new_len)


def test_moves_by_hand():
    moves, new_len = compact(range(8), {0, 2, 6})
    assert (moves, new_len) == ([(7, 0), (5, 2)], 5)
    np.testing.assert_array_equal(apply_moves(np.arange(8), moves, new_len), [7, 1, 5, 3, 4])


def test_moves_of_rows_leave_the_original_alone():
    kvs = np.arange(12).reshape(6, 2)
    moves, new_len = compact(kvs, {1, 4})
    np.testing.assert_array_equal(apply_moves(kvs, moves, new_len), kvs[[0, 5, 2, 3]])
    np.testing.assert_array_equal(kvs, np.arange(12).reshape(6, 2))


def test_an_evicted_kv_that_is_not_held_is_refused():
    with pytest.raises(ValueError, match="head of 3 KVs"):
        compact(range(3), {3})


@given(sequences(min_blocks=1))
def test_attention_after_the_moves_is_attention_over_the_survivors(sequence):
    scores, evictable, block_size, evict_blocks = sequence
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2 * len(scores), 4))
    keys, values = ([rng.standard_normal((len(s), 4)) for s in scores] for _ in range(2))
    _, gone = evict_threshold(scores, evictable, block_size, evict_blocks)
    survivors = [[i for i in range(len(s)) if i not in out] for s, out in zip(scores, gone, strict=True)]
    plans = [compact(k, out) for k, out in zip(keys, gone, strict=True)]
    moved_keys, moved_values = (
        [apply_moves(x, *plan) for x, plan in zip(kvs, plans, strict=True)] for kvs in (keys, values)
    )
    kept_keys, kept_values = ([x[s] for x, s in zip(kvs, survivors, strict=True)] for kvs in (keys, values))
    moved, _, _ = ragged_attention(query, moved_keys, moved_values)
    kept, _, _ = ragged_attention(query, kept_keys, kept_values)
    np.testing.assert_allclose(moved, kept, rtol=1e-9, atol=1e-12)
