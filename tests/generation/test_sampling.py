"""Which tokens may be drawn, how often, and that a draw depends on nothing but seed and position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.generation.sampling import Greedy, Random, logprobs_of, restrict

pytestmark = pytest.mark.once

VOCAB = 12


def allowed(logits, top_k, top_p, min_p):
    """The set that the definitions leave, likeliest first."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    p = np.exp(logits - logits.max())
    p /= p.sum()
    kept, total = [], 0.0
    for rank, i in enumerate(order):
        if (top_k and rank >= top_k) or (top_p < 1 and total >= top_p) or p[i] < min_p * p.max():
            break
        kept.append(i)
        total += p[i]
    return set(kept)


restricted = jax.jit(restrict)


@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_what_is_left_to_draw_from(seed, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 3
    got = restricted(logits[None], top_k=jnp.array([top_k]), top_p=jnp.array([top_p]), min_p=jnp.array([min_p]))[0]
    left = set(np.flatnonzero(np.isfinite(got)))
    assert left == allowed(logits.astype(np.float64), top_k, top_p, min_p)
    np.testing.assert_array_equal(np.asarray(got)[list(left)], logits[list(left)])


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"top_k": 1}, {1, 3}),
        ({"top_k": 3}, {0, 1, 3, 4}),
        ({"top_k": 4}, {0, 1, 3, 4}),
        ({"top_p": 0.3}, {1, 3}),
        ({"min_p": 1.0}, {1, 3}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_equally_likely_tokens_stay_or_go_together(settings, left):
    logits = np.array([1.0, 2.0, -1.0, 2.0, 1.0], np.float32)
    wanted = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    got = restricted(logits[None], **{name: jnp.array([value]) for name, value in wanted.items()})[0]
    assert set(np.flatnonzero(np.isfinite(got))) == left


def sampler(rows, **settings):
    default = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    chosen = {**default, **settings}
    return Random(
        seed=jnp.arange(rows, dtype=jnp.uint32),
        temperature=jnp.full(rows, chosen["temperature"], jnp.float32),
        top_k=jnp.full(rows, chosen["top_k"], jnp.int32),
        top_p=jnp.full(rows, chosen["top_p"], jnp.float32),
        min_p=jnp.full(rows, chosen["min_p"], jnp.float32),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    rows = 20_000
    logits = jnp.array([1.0, 0.0, -1.0, 2.0])
    drawn = sampler(rows, temperature=temperature)(jnp.tile(logits, (rows, 1)), jnp.zeros(rows, jnp.int32))
    share = np.bincount(np.asarray(drawn), minlength=4) / rows
    np.testing.assert_allclose(share, jax.nn.softmax(logits / temperature), atol=4 * 0.5 / rows**0.5)


@pytest.mark.parametrize(
    ("settings", "left"), [({"top_k": 2}, [3, 0]), ({"top_p": 0.8}, [3, 0]), ({"min_p": 0.1}, [3, 0, 1])]
)
def test_draws_follow_the_softmax_of_what_is_left(settings, left):
    rows, logits = 20_000, np.array([1.0, 0.0, -1.0, 2.0])
    drawn = sampler(rows, **settings)(jnp.tile(jnp.asarray(logits), (rows, 1)), jnp.zeros(rows, jnp.int32))
    counts = np.bincount(np.asarray(drawn), minlength=4)
    expected = rows * np.exp(logits[left]) / np.exp(logits[left]).sum()
    assert counts[left].sum() == rows
    assert ((counts[left] - expected) ** 2 / expected).sum() < 16  # chi-square, 2 degrees at most: p > 0.0003


def test_a_row_draws_the_same_in_any_batch_and_anew_at_each_position():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 50)), jnp.float32)
    draw = sampler(5)
    together = draw(logits, jnp.full(5, 7))
    alone = jax.tree.map(lambda x: x[3:4], draw)(logits[3:4], jnp.array([7]))
    assert int(alone[0]) == int(together[3])
    over_time = [int(jax.tree.map(lambda x: x[:1], draw)(logits[:1], jnp.array([t]))[0]) for t in range(30)]
    assert len(set(over_time)) > 5


def test_temperature_zero_and_top_one_are_greedy():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((6, 40)), jnp.float32)
    at = jnp.zeros(6, jnp.int32)
    best = Greedy()(logits, at)
    np.testing.assert_array_equal(best, np.asarray(logits).argmax(-1))
    np.testing.assert_array_equal(sampler(6, temperature=0.0)(logits, at), best)
    np.testing.assert_array_equal(sampler(6, top_k=1)(logits, at), best)


def test_logprobs_are_the_models():
    logits = np.random.default_rng(2).standard_normal((3, 20)).astype(np.float32)
    tokens = jnp.array([4, 0, 19])
    wanted = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[np.arange(3), np.asarray(tokens)]
    np.testing.assert_allclose(logprobs_of(jnp.asarray(logits), tokens), wanted, atol=1e-5)


def test_logprobs_of_large_logits_stay_finite():
    logits = jnp.array([[1000.0, 998.0, -1000.0], [-5000.0, -5000.0, -5001.0]])
    wanted = [-2 - np.log1p(np.exp(-2)), -np.log(2 + np.exp(-1))]
    np.testing.assert_allclose(logprobs_of(logits, jnp.array([1, 0])), wanted, rtol=1e-3)
