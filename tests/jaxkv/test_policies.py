"""Each policy's score as its paper gives it, in plain numpy over a dense run of the model, and memory really freed."""

from functools import partial

import jax
import numpy as np
import pytest
import tiny

from jaxkv import compress, prefill, stats
from jaxkv.policies import POLICIES, MaxTokens, Ratio, make_policy

LENGTH, GROUP, KV_HEADS = 200, 3, 2


@partial(jax.jit, static_argnames=("policy", "chunk"), donate_argnums=0)
def read(cache, tokens, lengths, policy, chunk=512):
    return prefill(tiny.MODEL, cache, tokens, lengths, policy, chunk=chunk)


shrink = jax.jit(compress, static_argnames="policy", donate_argnums=0)


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
    "tova": lambda p: np.repeat(p[:, None, :, -1].mean(2), KV_HEADS, axis=1),
    "streaming-llm": lambda p: np.zeros((2, KV_HEADS, LENGTH)) + np.arange(LENGTH),
}


@pytest.mark.parametrize("chunk", [512, 64])
@pytest.mark.parametrize("name", ORACLES)
def test_scores_are_those_of_the_paper(name, chunk):
    policy = make_policy(name, MaxTokens(tokens=LENGTH))
    ids = tiny.prompt(LENGTH, seed=3)
    cache, _ = read(tiny.empty_cache(), *tiny.padded([ids]), policy, chunk)
    expected = ORACLES[name](tiny.dense_run(ids)[1])
    for layer, head in np.ndindex(2, KV_HEADS):
        found = tiny.by_position(cache, cache.scores, layer, 0, head)
        scores = np.array([found[i] for i in range(LENGTH)])
        ranks = policy.rank(scores, np.arange(LENGTH))
        np.testing.assert_allclose(ranks, expected[layer, head], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_frees_memory(name):
    policy = make_policy(name, Ratio(ratio=3))
    full, _ = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(LENGTH)]), policy)
    before = stats(full)
    after = shrink(full, policy=policy)
    held = stats(after)
    assert held.blocks_held == before.blocks_held // 3
    assert held.blocks_held + held.blocks_free == before.blocks_held + before.blocks_free
    for layer, head in np.ndindex(2, KV_HEADS):
        kept = set(tiny.by_position(after, after.scores, layer, 0, head))
        assert kept >= set(range(policy.sinks)) | set(range(LENGTH - policy.protected_window + 1, LENGTH))


def test_names_and_budgets_that_make_no_policy_say_why():
    assert make_policy("none", None) is None
    for name, budget, said in (
        ("none", Ratio(ratio=2), "keeps everything"),
        ("snapvk", Ratio(ratio=2), "none, kv-compress, .*snapkv"),
        ("tova", None, "needs a budget"),
    ):
        with pytest.raises(ValueError, match=said):
            make_policy(name, budget)
    with pytest.raises(ValueError, match=r"streaming-llm: .*window"):
        make_policy("streaming-llm", Ratio(ratio=2), window=3)
