"""KV-Compress's metric, observed through the model, against a dense oracle (section 3 of the paper)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles.kv_compress import decode_metric, prefill_metric

from jaxkv.generation.decode import decode_step
from jaxkv.generation.prefill import prefill
from jaxkv.policies import KVCompress, MaxTokens
from jaxkv.policies.kv_compress import l1, l2

pytestmark = pytest.mark.once

BUDGET = MaxTokens(tokens=512)
NAMES = {l1: "l1", l2: "l2", jnp.sum: "sum", jnp.mean: "mean", jnp.max: "max"}


def scores_of(cache, layer, row, head):
    found = tiny.by_position(cache, cache.raw.scores, layer, row, head)
    return np.array([found[p] for p in sorted(found)])


def expected(probabilities, policy):
    return prefill_metric(
        probabilities,
        tiny.CONFIG.num_kv_heads,
        policy.window,
        NAMES[policy.norm],
        NAMES[policy.group],
        policy.pool,
        policy.buffer,
    )


@partial(jax.jit, static_argnames=("policy", "chunk"), donate_argnums=0)
def read(cache, tokens, lengths, policy, chunk=512):
    return prefill(tiny.MODEL, cache, tokens, lengths, policy, chunk=chunk)


@partial(jax.jit, static_argnames="policy", donate_argnums=0)
def step(cache, tokens, active, policy):
    return decode_step(tiny.MODEL, cache, tokens, active, policy)


POLICIES = {
    "default": KVCompress(budget=BUDGET),
    "window of 32": KVCompress(budget=BUDGET, window=32),
    "all queries": KVCompress.full(budget=BUDGET),
    "l1": KVCompress(budget=BUDGET, norm=l1),
    "mean": KVCompress(budget=BUDGET, group=jnp.mean),
    "max": KVCompress(budget=BUDGET, group=jnp.max),
    "no pooling": KVCompress(budget=BUDGET, pool=1),
    "buffer": KVCompress(budget=BUDGET, buffer=5, window=20),
}


@pytest.mark.parametrize("name", POLICIES)
def test_prompt_scores_equal_the_dense_oracle(name):
    policy = POLICIES[name]
    prompts = [tiny.prompt(90, 1), tiny.prompt(5, 2), tiny.prompt(33, 3)]
    cache, _ = read(tiny.empty_cache(batch=3), *tiny.padded(prompts), policy)
    for row, ids in enumerate(prompts):
        _, probabilities = tiny.dense_run(ids)
        for layer in range(tiny.CONFIG.num_layers):
            metric = expected(probabilities[layer], policy)
            for head in range(tiny.CONFIG.num_kv_heads):
                np.testing.assert_allclose(scores_of(cache, layer, row, head), metric[head], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["default", "window of 32", "all queries", "buffer"])
def test_prompt_scores_do_not_depend_on_the_chunks(name):
    policy = POLICIES[name]
    ids = tiny.padded([tiny.prompt(90, 4), tiny.prompt(41, 5)])
    whole, one = read(tiny.empty_cache(batch=2), *ids, policy)
    parts, other = read(tiny.empty_cache(batch=2), *ids, policy, chunk=16)
    np.testing.assert_allclose(one, other, atol=1e-4)
    for layer, row, head in np.ndindex(2, 2, 2):
        np.testing.assert_allclose(
            scores_of(parts, layer, row, head), scores_of(whole, layer, row, head), rtol=1e-4, atol=1e-6
        )


def test_unpooled_l1_of_one_query_sums_to_the_group():
    policy = KVCompress(budget=BUDGET, window=1, norm=l1, pool=1)
    cache, _ = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(50)]), policy)
    for layer, head in np.ndindex(2, 2):
        assert scores_of(cache, layer, 0, head).sum() == pytest.approx(3, abs=1e-5)  # 3 query heads a KV head


def test_of_prompt_sums_over_the_group_whatever_its_order():
    rng = np.random.default_rng(0)
    mass = jnp.asarray(rng.random((1, 1, 2, 3, 40)), jnp.float32)
    held = jnp.ones((1, 1, 2, 40), bool)
    policy = KVCompress(budget=BUDGET)
    scores = policy.scorer.score(mass, held)
    np.testing.assert_allclose(policy.scorer.score(mass[..., ::-1, :], held), scores, rtol=1e-6)
    np.testing.assert_allclose(policy.scorer.score(jnp.concatenate([mass, mass], -2), held), 2 * scores, rtol=1e-6)


def test_recording_changes_no_logit():
    ids = tiny.padded([tiny.prompt(70)])
    recorded, with_scores = read(tiny.empty_cache(), *ids, KVCompress(budget=BUDGET))
    plain, without = read(tiny.empty_cache(), *ids, None)
    np.testing.assert_array_equal(with_scores, without)
    token, active = jnp.array([3]), jnp.array([True])
    _, with_scores = step(recorded, token, active, KVCompress(budget=BUDGET, compress_every=1000))
    _, without = step(plain, token, active, None)
    np.testing.assert_array_equal(with_scores, without)


@pytest.mark.parametrize("buffer", [0, 3])
@pytest.mark.parametrize("norm", [l1, l2])
def test_prefill_and_decode_add_up_to_one_dense_run(norm, buffer):
    """Equation 20: scores after decoding equal the prompt's plus each later query's, teacher-forced."""
    policy = KVCompress(budget=BUDGET, norm=norm, buffer=buffer, compress_every=10_000)
    ids = tiny.prompt(45, 6)
    known = 30
    cache, _ = read(tiny.empty_cache(), *tiny.padded([ids[:known]]), policy)
    for token in ids[known:]:
        cache, _ = step(cache, jnp.array([token]), jnp.array([True]), policy)
    _, probabilities = tiny.dense_run(ids)
    _, of_prompt = tiny.dense_run(ids[:known])
    for layer in range(2):
        metric = np.zeros((2, len(ids)))
        metric[:, :known] = expected(of_prompt[layer], policy)
        for query in range(known, len(ids)):
            metric[:, : query + 1] += decode_metric(
                probabilities[layer][:, query, : query + 1],
                2,
                np.arange(query + 1),
                query,
                NAMES[norm],
                "sum",
                buffer,
            )
        for head in range(2):
            np.testing.assert_allclose(scores_of(cache, layer, 0, head), metric[head], rtol=5e-4, atol=5e-6)


def test_a_new_kv_starts_at_zero_whatever_its_slot_held():
    cache = tiny.empty_cache()
    used = replace(cache.raw, scores=cache.raw.scores + 77.0, positions=cache.raw.positions - 5)
    cache = replace(cache, raw=used)
    policy = KVCompress(budget=BUDGET, buffer=30, window=8)  # the newest 30 get nothing from the prompt
    cache, _ = read(cache, *tiny.padded([tiny.prompt(64)]), policy)
    for layer, head in np.ndindex(2, 2):
        assert (scores_of(cache, layer, 0, head)[-30 + 7 + 3 :] == 0).all()  # pooling reaches 3 further
        assert sorted(tiny.by_position(cache, cache.raw.scores, layer, 0, head)) == list(range(64))


def test_an_inactive_row_is_left_as_it_is():
    policy = KVCompress(budget=BUDGET, compress_every=1000)
    cache, _ = read(tiny.empty_cache(batch=2), *tiny.padded([tiny.prompt(20, 1), tiny.prompt(31, 2)]), policy)
    before = [scores_of(cache, layer, 0, head) for layer, head in np.ndindex(2, 2)]
    cache, _ = step(cache, jnp.array([5, 6]), jnp.array([False, True]), policy)
    after = [scores_of(cache, layer, 0, head) for layer, head in np.ndindex(2, 2)]
    np.testing.assert_array_equal(before, after)
    assert cache.num_tokens.tolist() == [20, 32]
