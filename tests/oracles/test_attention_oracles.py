"""The oracles of attention and of metrics, against loops over single numbers and figures worked out by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles.attention import dense_attention, ragged_attention
from oracles.kv_compress import decode_metric, prefill_metric


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
