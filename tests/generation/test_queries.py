"""Mean and covariance of queries that come in chunks, and what others like them attend to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv import SamplingParams, prefill
from jaxkv.cache.contents import contents
from jaxkv.engine.prefixes import readable
from jaxkv.generation.query_moments import QueryMoments
from jaxkv.policies import ExpectedAttention, Mixed, Ratio, make_policy
from jaxkv.requests import Request
from models import stack_layers
from models.rope import rotate, rotation

pytestmark = pytest.mark.once

CONFIG = replace(tiny.CONFIG, num_layers=1)
HEADS, HEAD_DIM = CONFIG.num_heads, CONFIG.head_dim


@jax.jit
def added(moments, query, positions, real):
    rotated_by = rotation(positions, head_dim=HEAD_DIM, theta=CONFIG.rope_theta, scaling=None)
    return moments.with_layer(0, rotate(query, rotated_by), rotated_by, real).plus(real)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_chunks_add_up_to_the_moments_of_all(chunks, seed):
    """Also where the mean is a hundred times the deviation, and where a chunk has nothing for a row."""
    rng = np.random.default_rng(seed)
    moments = QueryMoments.none(CONFIG, 2)
    seen, at = [[], []], np.array([rng.integers(500), 0])
    centre = 100 * rng.standard_normal((HEADS, HEAD_DIM))
    for counts in chunks:
        query = centre + rng.standard_normal((2, 8, HEADS, HEAD_DIM))
        real = np.arange(8) < np.array(counts)[:, None]
        positions = at[:, None] + np.arange(8)
        moments = added(moments, jnp.asarray(query, jnp.float32), jnp.asarray(positions), jnp.asarray(real))
        at += counts
        for row in range(2):
            seen[row].extend(query[row][real[row]])
    for row, queries in enumerate(map(np.array, seen)):
        assert moments.count[row] == len(queries)
        if len(queries):
            np.testing.assert_allclose(moments.mean[0, row], queries.mean(0), rtol=1e-4, atol=2e-4)
            for head in range(HEADS):
                covariance = np.cov(queries[:, head].T, bias=True)
                np.testing.assert_allclose(moments.scatter[0, row, head] / len(queries), covariance, atol=0.02)


def test_a_prompt_within_the_sinks_has_no_score():
    policy = make_policy("expected-attention", Ratio(ratio=2))
    tokens, lengths = tiny.padded([tiny.prompt(3), tiny.prompt(100)])
    cache, _ = jax.jit(lambda c: prefill(tiny.MODEL, c, tokens, lengths, policy))(tiny.empty_cache(batch=2))
    for row, length in enumerate((3, 100)):
        scores = np.array([tiny.by_position(cache, cache.raw.scores, 1, row, 0)[p] for p in range(length)])
        assert not scores[:4].any()
        assert (scores[4:] > 0).all()


def test_a_prompt_is_read_whole_by_itself():
    """Its queries are those of all of it, so none of it may be another's to read."""
    settings = {"prompt": tiny.prompt(200), "params": SamplingParams(), "limit": 5, "index": 0}
    budget = Ratio(ratio=2)
    assert readable(Request(policy=make_policy("expected-attention", budget), **settings)) == 0
    assert readable(Request(policy=make_policy("snapkv", budget), **settings)) == 168


def test_tiers_rank_by_what_is_expected():
    """And stacked layers, which hand the moments from one to the next by a scan, make no difference."""
    settings = {"budget": Ratio(ratio=3), "future": 64, "protected_window": 8}
    plain, mixed = ExpectedAttention(**settings), Mixed.over(ExpectedAttention, block_tokens=32, **settings)
    tokens, lengths = tiny.padded([tiny.prompt(150)])
    graph, weights = nnx.split(tiny.MODEL)
    stacked = stack_layers(nnx.merge(graph, jax.tree.map(jnp.copy, weights)))
    caches = [
        jax.jit(lambda c, m=m, p=p: prefill(m, c, tokens, lengths, p, chunk=64)[0])(tiny.empty_cache(**sizes))
        for m, p, sizes in ((tiny.MODEL, plain, {}), (stacked, mixed, {"layout": mixed.placement.layout(HEAD_DIM)}))
    ]
    assert (mixed.sinks, mixed.scorer.observes.count) == (4, 64)
    found = contents(caches[1])
    for layer, head in np.ndindex(2, 2):
        scores = tiny.by_position(caches[0], caches[0].raw.scores, layer, 0, head)
        at = np.array(found.positions)[layer, 0, head, :150]
        expected = [scores[p] for p in at]
        np.testing.assert_allclose(np.array(found.scores)[layer, 0, head, :150], expected, rtol=1e-4, atol=1e-7)
