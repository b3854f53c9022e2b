"""Each policy's score as its paper gives it, in plain numpy over a dense run of the model, and memory really freed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxkv import LLM, SamplingParams, compress, decode, prefill, stats
from jaxkv.cache.contents import contents
from jaxkv.cache.home import GONE
from jaxkv.compression.budget import MOST, Footprint
from jaxkv.generation.prefill import look_ahead
from jaxkv.generation.scoring import score_unquantised
from jaxkv.policies import POLICIES, MaxBytes, MaxTokens, Ratio, make_policy
from models import causal_attention

pytestmark = pytest.mark.once

LENGTH, GROUP, KV_HEADS = 200, 3, 2


@partial(jax.jit, static_argnames=("policy", "chunk"), donate_argnums=0)
def read(cache, tokens, lengths, policy, chunk=512):
    return prefill(tiny.MODEL, cache, tokens, lengths, policy, chunk=chunk)


shrink = jax.jit(compress, static_argnames="policy", donate_argnums=0)


def empty_cache(policy):
    return tiny.empty_cache(layout=policy.placement.layout(tiny.CONFIG.head_dim))


def grouped(probabilities):
    """``[layers, heads, ...]`` -> ``[layers, kv_heads, group, ...]``."""
    return probabilities.reshape(len(probabilities), KV_HEADS, GROUP, *probabilities.shape[2:])


def mean_pooled(x, width):
    half = width // 2
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)])
    return np.stack([x[..., i : i + width].mean(-1) for i in range(x.shape[-1] - width + 1)], -1)


def snapkv(p, window=32):
    return mean_pooled(grouped(p)[..., -window:, :].mean((2, 3)), 5)


ORACLES = {
    "snapkv": snapkv,
    "ada-kv": snapkv,
    "pyramidkv": lambda p: snapkv(p, 8),
    "h2o": lambda p: grouped(p).sum((2, 3)),
    "leankv": lambda p: grouped(p)[..., -64:, :].sum(3).max(2),
    "tova": lambda p: np.repeat(p[:, None, :, -1].mean(2), KV_HEADS, axis=1),
    "streaming-llm": lambda p: np.zeros((2, KV_HEADS, LENGTH)) + np.arange(LENGTH),
}


def dense_kvs(ids):
    """Keys and values, ``f64[layers, kv_heads, tokens, head_dim]`` each."""
    found = []

    def attend(state, layer, query, key, value):
        found.append([np.asarray(x[0], np.float64).swapaxes(0, 1) for x in (key, value)])
        return causal_attention(state, layer, query, key, value)

    tiny.MODEL(jnp.asarray(ids)[None], jnp.arange(len(ids))[None], attend, None)
    return np.stack([k for k, _ in found]), np.stack([v for _, v in found])


def keydiff(keys):
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = unit.mean(-2, keepdims=True)
    return -(unit * anchor).sum(-1) / np.linalg.norm(anchor, axis=-1)


def rotations(positions):
    """RoPE as one matrix a position, ``[positions, head_dim, head_dim]``."""
    half = tiny.CONFIG.head_dim // 2
    angles = np.outer(positions, tiny.CONFIG.rope_theta ** (-np.arange(half) / half))
    found = np.zeros((len(positions), 2 * half, 2 * half))
    i = np.arange(half)
    found[:, i, i] = found[:, i + half, i + half] = np.cos(angles)
    found[:, i + half, i] = np.sin(angles)
    found[:, i, i + half] = -np.sin(angles)
    return found


def expected_attention(ids, future=512, sinks=4):
    """As Expected Attention's authors compute it, from queries that are turned back to position 0."""
    keys, values = dense_kvs(ids)
    queries = []

    def attend(state, layer, query, key, value):
        queries.append(np.asarray(query[0], np.float64))
        return causal_attention(state, layer, query, key, value)

    tiny.MODEL(jnp.asarray(ids)[None], jnp.arange(len(ids))[None], attend, None)
    length, d = len(ids), tiny.CONFIG.head_dim
    back = rotations(np.arange(length)).swapaxes(1, 2)
    mean_rotation = rotations(np.arange(length, length + future)).mean(0)
    scores = np.zeros((2, KV_HEADS, length))
    for layer, head in np.ndindex(2, KV_HEADS * GROUP):
        own = np.einsum("tij,tj->ti", back, queries[layer][:, head])[sinks:]
        mean, covariance = mean_rotation @ own.mean(0), mean_rotation @ np.cov(own.T, bias=True) @ mean_rotation.T
        key, value = (x[layer, head // GROUP, sinks:] for x in (keys, values))
        logits = key @ mean / np.sqrt(d) + np.einsum("ki,ij,kj->k", key, covariance, key) / (2 * d)
        attention = np.exp(logits - logits.max())
        scores[layer, head // GROUP, sinks:] += attention / attention.sum() / GROUP * np.linalg.norm(value, axis=-1)
    return scores


OF_KVS = {"knorm": lambda keys, values: -np.linalg.norm(keys, axis=-1), "keydiff": lambda keys, values: keydiff(keys)}


def reread(ids, chunk):
    """Attention to the prompt's tokens while its chunks come again after it: ``[layers, heads, tokens, tokens]``."""
    parts = []
    for at in range(0, len(ids), chunk):
        part = ids[at : at + chunk]
        parts.append(tiny.dense_run(np.concatenate([ids, part]))[1][:, :, len(ids) :, : len(ids)])
    return np.concatenate(parts, axis=2)


REREAD = {
    "kvzip": lambda p: (grouped(p) ** 4).sum(3).max(2) ** 0.25,
    "auto": lambda p: ((grouped(p) ** 4).sum(3) ** 0.25).mean(2),
}


CHUNK = 64


def expected_scores(name, ids):
    if name in REREAD:
        return REREAD[name](reread(ids, CHUNK))
    if name == "expected-attention":
        return expected_attention(ids)
    if name in OF_KVS:
        return OF_KVS[name](*dense_kvs(ids))
    return ORACLES[name](tiny.dense_run(ids)[1])


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "gate"])  # whose weights are a model's own
def test_scores_are_those_of_the_paper_and_memory_is_freed(name):
    policy = make_policy(name, Ratio(ratio=3))
    ids = tiny.prompt(LENGTH, seed=3)
    cache, _ = read(empty_cache(policy), *tiny.padded([ids]), policy, CHUNK)
    if name not in ("kv-compress", "kv-compress-full", "mixed"):  # test_kv_compress_metrics.py
        expected = expected_scores(name, ids)
        scored = score_unquantised(cache, policy) if policy.scorer.scores_kvs_alone else cache  # as compress does
        for layer, head in np.ndindex(2, KV_HEADS):
            found = tiny.by_position(scored, scored.raw.scores, layer, 0, head)
            ranks = policy.scorer.rank(np.array([found[i] for i in range(LENGTH)]), np.arange(LENGTH))
            np.testing.assert_allclose(ranks, expected[layer, head], rtol=2e-4, atol=2e-6)

    before = stats(cache)
    after = shrink(cache, policy=policy)
    held = stats(after)
    if after.layout is None:
        assert held.blocks_held == before.blocks_held // 3
        assert held.blocks_held + held.blocks_free == before.blocks_held + before.blocks_free
    else:
        most = before.blocks_full // 3 * after.raw.block_bytes // after.layout.block_bytes
        assert held.blocks_held <= most
        assert held.blocks_held == most or held.kvs_held == held.kvs_full
        assert held.blocks_free == before.blocks_full + before.blocks_free
    for layer, head in np.ndindex(2, KV_HEADS):
        if after.layout is None:
            kept = set(tiny.by_position(after, after.raw.scores, layer, 0, head))
        else:
            now = contents(after)
            kept = set(np.array(now.positions)[layer, 0, head][np.array(now.home)[layer, 0, head] != GONE])
        assert kept >= set(range(policy.sinks)) | set(range(LENGTH - policy.protected_window + 1, LENGTH))


def test_budgets_beyond_any_cache_keep_all_and_impossible_ones_are_refused():
    cache = tiny.empty_cache()
    cache = tiny.with_tables(cache, lengths=jnp.full_like(cache.raw.lengths, 200))
    of = Footprint.of_sequence(cache, jnp.int32(200), 8)
    for budget in (MaxTokens(tokens=10**10), MaxBytes(size=10**15)):
        assert budget.unquantised_blocks(of) == MOST
    assert int(Ratio(ratio=3 * 10**8).unquantised_blocks(of)) == 4
    for make, said in (
        (lambda: Ratio(ratio=0.5), "got 0.5"),
        (lambda: Ratio(ratio=float("inf")), "more than 1e9"),
        (lambda: Ratio(ratio=10**400), "more than 1e9"),
        (lambda: Ratio(ratio=float("nan")), "ratio must be at least 1"),
        (lambda: MaxTokens(tokens=-5), "at least 1, got -5"),
        (lambda: MaxBytes(size=0), "at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            make()


def test_names_and_budgets_that_make_no_policy_say_why():
    assert make_policy("none", None) is None
    for name, budget, said in (
        ("none", Ratio(ratio=2), "keeps everything"),
        ("snapvk", Ratio(ratio=2), "none, kv-compress, .*snapkv"),
        ("tova", None, "needs a budget"),
    ):
        with pytest.raises(ValueError, match=said):
            make_policy(name, budget)
    with pytest.raises(ValueError, match=r"^policy streaming-llm has no window$"):
        make_policy("streaming-llm", Ratio(ratio=2), window=3)
    for name, setting, said in (
        ("snapkv", {"window": None}, r"window must be at least 1 query and below 2\*\*31, got 0"),
        ("ada-kv", {"window": -3}, r"window must be at least 1 query and below 2\*\*31, got -3"),
        ("snapkv", {"pool": 4}, "pool must be odd"),
        ("auto", {"compress_every": 8}, "Auto doesn't rank what is decoded"),
        ("mixed", {"compress_every": 8, "buffer": 3}, "Mixed doesn't rank what is decoded"),
        ("leankv", {"sinks": 4}, "leankv protects no sinks, got sinks=4"),
        ("keydiff", {"compress_every": 8}, "KeyDiff doesn't rank what is decoded"),
    ):
        with pytest.raises(ValueError, match=said):
            make_policy(name, Ratio(ratio=2), **setting)


@pytest.mark.parametrize("name", ["kvzip", "auto", "expected-attention"])
def test_an_engine_scores_as_the_functions_do(name):
    policy = make_policy(name, Ratio(ratio=3))
    ids = tiny.prompt(LENGTH, seed=5)
    [answer] = LLM(tiny.MODEL, compression=policy).generate([ids.tolist()], SamplingParams(max_tokens=12))
    cache, logits = read(empty_cache(policy), *tiny.padded([ids]), policy)
    last = jnp.argmax(logits, -1)
    rest = decode(  # goes on past the end token
        tiny.MODEL, shrink(cache, policy=policy), last, jnp.array([11]), steps=11, policy=policy
    )
    made = [int(last[0]), *rest.tokens[0].tolist()]
    assert answer.token_ids == made[: len(answer.token_ids)]
    assert len(answer.token_ids) > 5


def test_looking_ahead_is_prefill_that_leaves_no_trace():
    ids = tiny.prompt(90, seed=6)
    cache, _ = read(tiny.empty_cache(), *tiny.padded([ids[:70]]), None)
    before = jax.tree.map(np.array, cache)
    hidden = jax.jit(lambda c, t: look_ahead(tiny.MODEL, c, t))(cache, jnp.asarray(ids[None, 70:]))
    np.testing.assert_allclose(tiny.MODEL.logits(hidden)[0], tiny.dense_run(ids)[0][70:], atol=2e-4)
    jax.tree.map(np.testing.assert_array_equal, before, cache)


def test_a_count_of_blocks_overrules_the_budget():
    policy = make_policy("h2o", Ratio(ratio=2))
    cache, _ = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(LENGTH)]), policy)
    before = stats(cache).blocks_held
    small = jax.jit(lambda c: compress(c, policy, room=jnp.array([before - 5])))(cache)
    assert stats(small).blocks_held == before - 5
