"""The oracles against each other, against loops over single numbers, and against figures worked out by hand."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles.attention import dense_attention, ragged_attention
from oracles.kv_compress import (
    after_lengths,
    apply_moves,
    compact,
    decode_metric,
    evict_count,
    evict_greedy,
    evict_threshold,
    evicted_kvs,
    hang_of,
    max_evictable,
    prefill_metric,
    protected,
)

EVICTIONS = [evict_greedy, evict_threshold]


def random_attention(heads=6, kv_heads=2, queries=12, seed=0):
    """Query, key, value and the outcome of causal attention of a prompt."""
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((queries, heads, 4))
    key, value = rng.standard_normal((2, queries, kv_heads, 4))
    return query, key, value, *dense_attention(query, key, value, np.arange(queries), np.arange(queries))


# Attention


def test_dense_attention_equals_a_loop_over_single_probabilities():
    query, key, value, out, probabilities = random_attention(queries=5)
    for q, head in np.ndindex(5, 6):
        weights = [math.exp(0.5 * float(query[q, head] @ key[j, head // 3])) for j in range(q + 1)]
        wanted = [w / sum(weights) for w in weights] + [0.0] * (4 - q)
        np.testing.assert_allclose(probabilities[head, q], wanted, rtol=1e-12)
        np.testing.assert_allclose(out[q, head], wanted @ value[:, head // 3], rtol=1e-12)


def test_dense_attention_masks_by_position_and_not_by_index():
    query, key, value, out, _ = random_attention()
    order = np.random.default_rng(1).permutation(12)
    shuffled, probabilities = dense_attention(query[[7]], key[order], value[order], np.array([7]), order)
    np.testing.assert_allclose(shuffled[0], out[7], rtol=1e-12)
    assert (probabilities[:, 0, order > 7] == 0).all()


def test_the_scale_is_what_it_is_given():
    query, key, value, _, _ = random_attention(queries=4)
    _, probabilities = dense_attention(query, key, value, np.arange(4), np.arange(4), scale=0.0)
    np.testing.assert_allclose(probabilities[:, 3], 0.25)
    _, (mass, _), _ = ragged_attention(query[0], [key[:, 0], key[:, 1]], [value[:, 0], value[:, 1]], scale=0.0)
    np.testing.assert_allclose(mass, 0.75)


def test_what_sees_no_key_gives_zeros():
    query, key, value, _, _ = random_attention(queries=3)
    out, probabilities = dense_attention(query, key, value, np.array([-1, 0, 1]), np.arange(3))
    assert (out[0] == 0).all()
    assert (probabilities[:, 0] == 0).all()
    np.testing.assert_allclose(probabilities[:, 1:].sum(-1), 1)
    out, probabilities = dense_attention(query, key[:0], value[:0], np.arange(3), np.arange(0))
    assert out.shape == (3, 6, 4)
    assert probabilities.shape == (6, 3, 0)
    assert (out == 0).all()


def test_ragged_attention_of_whole_heads_equals_the_dense_last_query():
    query, key, value, out, probabilities = random_attention()
    keys, values = list(key.transpose(1, 0, 2)), list(value.transpose(1, 0, 2))
    ragged, mass, squared = ragged_attention(query[-1], keys, values)
    np.testing.assert_allclose(ragged, out[-1], rtol=1e-12)
    grouped = probabilities[:, -1].reshape(2, 3, 12)
    np.testing.assert_allclose(mass, grouped.sum(1), rtol=1e-12)
    np.testing.assert_allclose(squared, (grouped**2).sum(1), rtol=1e-12)


def test_ragged_attention_gives_each_head_its_own_length():
    query, key, value, _, _ = random_attention()
    alone, _, _ = ragged_attention(query[-1, :3], [key[:5, 0]], [value[:5, 0]])
    out, mass, squared = ragged_attention(query[-1], [key[:5, 0], key[:0, 1]], [value[:5, 0], value[:0, 1]])
    np.testing.assert_array_equal(out[:3], alone)
    assert (out[3:] == 0).all()
    assert [len(x) for x in mass] == [len(x) for x in squared] == [5, 0]
    assert mass[0].sum() == pytest.approx(3)


# Metrics


def test_the_prompt_metric_of_a_plain_case_is_the_column_sum_of_squares():
    *_, probabilities = random_attention(heads=2)
    metric = prefill_metric(probabilities, 2, 5, "l2", "sum", 1, 0)
    np.testing.assert_allclose(metric, (probabilities[:, -5:] ** 2).sum(1), rtol=1e-12)


def test_the_prompt_metric_by_hand():
    """Two query heads on one KV head, three tokens: squares, the diagonal left out, pooled before heads are added."""
    probabilities = np.array([[[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]], [[1, 0, 0], [0, 1, 0], [0, 0.6, 0.4]]])
    first, second = [0.25 + 0.04, 0.09, 0], [0, 0.36, 0]
    plain = prefill_metric(probabilities, 1, None, "l2", "sum", 1, 1)
    np.testing.assert_allclose(plain, [[first[0] + second[0], first[1] + second[1], 0]])
    pooled = prefill_metric(probabilities, 1, None, "l2", "sum", 3, 1)
    np.testing.assert_allclose(pooled, [[0.29 + 0.36, 0.29 + 0.36, 0.09 + 0.36]])


@given(st.permutations(range(3)), st.sampled_from(["sum", "mean", "max"]), st.sampled_from([1, 3, 7]))
def test_no_order_of_a_query_group_changes_its_metric(order, group, pool):
    *_, probabilities = random_attention()
    shuffled = probabilities.reshape(2, 3, 12, 12)[:, list(order)].reshape(6, 12, 12)
    one, other = (prefill_metric(p, 2, 8, "l2", group, pool, 0) for p in (probabilities, shuffled))
    np.testing.assert_allclose(one, other, rtol=1e-12)
    one, other = (decode_metric(p[:, -1], 2, np.arange(12), 11, "l2", group, 0) for p in (probabilities, shuffled))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_head_seen_twice_doubles_the_sum_and_neither_mean_nor_max():
    *_, probabilities = random_attention(heads=2)
    twice = np.repeat(probabilities, 2, axis=0)
    for group, factor in (("sum", 2), ("mean", 1), ("max", 1)):
        one, two = (prefill_metric(p, 2, None, "l2", group, 7, 0) for p in (probabilities, twice))
        np.testing.assert_allclose(two, factor * one, rtol=1e-12)


def test_l1_of_one_query_sums_to_one_in_each_query_head():
    *_, probabilities = random_attention(heads=2)
    np.testing.assert_allclose(prefill_metric(probabilities, 2, 1, "l1", "sum", 1, 0).sum(1), 1)
    np.testing.assert_allclose(decode_metric(probabilities[:, -1], 2, np.arange(12), 11, "l1", "sum", 0).sum(1), 1)


@given(st.integers(0, 14))
def test_a_buffer_leaves_recent_pairs_out(buffer):
    *_, probabilities = random_attention(heads=2)
    metric = prefill_metric(probabilities, 2, 4, "l2", "sum", 1, buffer)
    wanted = np.zeros((2, 12))
    for head, query, key in np.ndindex(2, 12, 12):
        if query >= 8 and query - key >= buffer:
            wanted[head, key] += probabilities[head, query, key] ** 2
    np.testing.assert_allclose(metric, wanted, rtol=1e-12)
    decoded = decode_metric(probabilities[:, -1], 2, np.arange(12), 11, "l2", "sum", buffer)
    recent = 11 - np.arange(12) < buffer
    assert (decoded[:, recent] == 0).all()
    assert (decoded[:, ~recent] > 0).all()


def test_a_buffer_hides_even_what_is_not_a_number():
    probabilities = np.full((2, 4), np.nan)
    assert (decode_metric(probabilities, 1, np.arange(4), 3, "l2", "sum", 4) == 0).all()


@pytest.mark.parametrize("group", ["sum", "mean"])
@given(cuts=st.sets(st.integers(1, 11)), buffer=st.integers(0, 3))
def test_without_pooling_chunks_of_queries_add_up(group, cuts, buffer):
    *_, probabilities = random_attention()
    edges = [0, *sorted(cuts), 12]
    total = np.zeros((2, 12))
    for start, end in pairwise(edges):
        total[:, :end] += prefill_metric(probabilities[:, start:end, :end], 2, None, "l2", group, 1, buffer)
    np.testing.assert_allclose(total, prefill_metric(probabilities, 2, None, "l2", group, 1, buffer), rtol=1e-12)


def test_a_short_prompt_uses_all_its_queries():
    *_, probabilities = random_attention()
    for window in (12, 32):
        np.testing.assert_array_equal(
            prefill_metric(probabilities, 2, window, "l2", "sum", 7, 0),
            prefill_metric(probabilities, 2, None, "l2", "sum", 7, 0),
        )


def test_the_last_queries_alone_are_enough_for_their_window():
    *_, probabilities = random_attention()
    np.testing.assert_array_equal(
        prefill_metric(probabilities[:, -5:], 2, 5, "l2", "sum", 7, 2),
        prefill_metric(probabilities, 2, 5, "l2", "sum", 7, 2),
    )


def test_pooling_reaches_over_all_keys_the_window_included():
    probabilities = np.zeros((1, 12, 12))
    probabilities[0, -1, -1] = 1
    metric = prefill_metric(probabilities, 1, 2, "l2", "sum", 7, 0)
    np.testing.assert_array_equal(metric[0], [0] * 8 + [1] * 4)


@pytest.mark.parametrize("pool", [0, 2])
def test_an_even_pool_is_refused(pool):
    with pytest.raises(ValueError, match="odd width"):
        prefill_metric(np.zeros((1, 3, 3)), 1, None, "l2", "sum", pool, 0)


def test_decoding_adds_up_to_the_queries_of_one_prompt():
    *_, probabilities = random_attention()
    total = prefill_metric(probabilities[:, :7, :7], 2, None, "l2", "sum", 1, 2)
    total = np.pad(total, ((0, 0), (0, 5)))
    for query in range(7, 12):
        total += decode_metric(probabilities[:, query], 2, np.arange(12), query, "l2", "sum", 2)
    np.testing.assert_allclose(total, prefill_metric(probabilities, 2, None, "l2", "sum", 1, 2), rtol=1e-12)


def test_heads_may_hold_different_positions():
    *_, probabilities = random_attention()
    positions = np.stack([np.arange(12), np.arange(12)[::-1]])
    both = decode_metric(probabilities[:, -1], 2, positions, 11, "l2", "sum", 4)
    for head in range(2):
        alone = decode_metric(probabilities[3 * head : 3 * head + 3, -1], 1, positions[head], 11, "l2", "sum", 4)
        np.testing.assert_array_equal(both[head], alone[0])


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
