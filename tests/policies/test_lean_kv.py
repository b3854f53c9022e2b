"""LeanKV end to end against a plain numpy LeanKV: which token lives where, its score, and what the model says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.lean_kv import Head
from tiny import CONFIG, MODEL, dense_run, padded, prompt

from jaxkv.cache import CacheConfig, init_cache
from jaxkv.cache.contents import contents
from jaxkv.cache.home import HIGH, LOW
from jaxkv.generation.compress import compress
from jaxkv.generation.decode import decode_step
from jaxkv.generation.prefill import prefill
from jaxkv.policies import LeanKV
from pallas_kernels.quantised_block import Format, blocks

POLICY = LeanKV(high_threshold=1.2, low_threshold=0.3, protected_window=16, block_tokens=8)
EVERYTHING = LeanKV(high_threshold=0.0, low_threshold=0.0, protected_window=16, block_tokens=8)
GROUP = CONFIG.num_heads // CONFIG.num_kv_heads


def empty(policy: LeanKV, batch: int, **sizes):
    layout = policy.placement.layout(CONFIG.head_dim)
    return init_cache(CacheConfig.for_model(CONFIG, batch=batch, max_context=256, layout=layout, **sizes))


@partial(jax.jit, static_argnames="policy")
def read(cache, tokens, lengths, policy):
    return prefill(MODEL, cache, tokens, lengths, policy, chunk=64)


@partial(jax.jit, static_argnames="policy")
def step(cache, token, policy):
    return decode_step(MODEL, cache, token, jnp.ones(token.shape, bool), policy)


shrink = jax.jit(compress, static_argnames="policy")


def compressed(policy: LeanKV, prompts: list[np.ndarray]):
    cache, logits = read(empty(policy, len(prompts)), *padded(prompts), policy)
    return shrink(cache, policy), logits


def tier_tokens(cache, layer: int, row: int, head: int, tier: int) -> blocks.Tokens:
    """What a head holds in a tier, dequantised, in order."""
    quantised = cache.tiers
    segments = quantised.layout.tiers[tier]
    count = int(quantised.tables.lengths[layer, row, head, tier])
    held = -(-count // segments.tokens)
    table = np.asarray(quantised.tables.block_table[layer, row, head])
    table = table[:held] if tier == HIGH else table[::-1][:held]
    words = np.asarray(quantised.pool).reshape(quantised.pool.shape[0], -1)[table]
    if not held:
        words = np.zeros((1, words.shape[-1]), np.uint32)
    tokens = blocks.decode(jnp.asarray(words), segments, CONFIG.head_dim)
    return blocks.Tokens(*(np.asarray(x).reshape(-1, *x.shape[2:])[:count] for x in tokens))


def oracle(policy: LeanKV, tokens: np.ndarray) -> list[list[Head]]:
    """Heads after a prompt, from the plain model's keys, values and probabilities."""
    kept = []

    def attend(state, layer, query, key, value):
        kept.append((np.asarray(key[0]), np.asarray(value[0])))
        return state, outputs[layer]

    _, probabilities = dense_run(tokens)
    outputs = dense_outputs(tokens)
    MODEL(jnp.asarray(tokens)[None], jnp.arange(len(tokens))[None], attend, None)
    mass = probabilities[:, :, -64:].sum(2)  # [layers, heads, keys]
    heads = []
    for layer, (keys, values) in enumerate(kept):
        heads.append([])
        for head in range(CONFIG.num_kv_heads):
            one = new_head(policy)
            one.prompt(keys[:, head], values[:, head], mass[layer, head * GROUP : (head + 1) * GROUP])
            heads[-1].append(one)
    return heads


def dense_outputs(tokens: np.ndarray) -> list:
    from oracles.attention import dense_attention

    outputs = []

    def attend(state, layer, query, key, value):
        q, k, v = (np.asarray(x[0], np.float64) for x in (query, key, value))
        out, _ = dense_attention(q, k, v, np.arange(len(tokens)), np.arange(len(tokens)))
        outputs.append(jnp.asarray(out, jnp.float32)[None])
        return state, outputs[-1]

    MODEL(jnp.asarray(tokens)[None], jnp.arange(len(tokens))[None], attend, None)
    return outputs


def new_head(policy: LeanKV) -> Head:
    def form(f: Format):
        return f.key_bits, f.value_bits, f.key_groups, f.value_groups

    return Head(
        form(policy.high),
        form(policy.low),
        policy.high_threshold,
        policy.low_threshold,
        policy.protected_window,
        [],
        [],
    )


def oracle_step(heads: list[list[Head]], token: int, position: int) -> tuple[np.ndarray, list[int]]:
    """Logits of one decode step of the numpy LeanKV, and the case of each head."""
    cases = []

    def attend(state, layer, query, key, value):
        out = []
        for head, one in enumerate(heads[layer]):
            cases.append(one.step(np.asarray(key[0, 0, head]), np.asarray(value[0, 0, head]), position))
            out.append(one.attend(np.asarray(query[0, 0, head * GROUP : (head + 1) * GROUP])))
        return state, jnp.asarray(np.concatenate(out), jnp.float32)[None, None]

    _, hidden = MODEL(jnp.array([[token]]), jnp.array([[position]]), attend, None)
    return np.asarray(MODEL.logits(hidden))[0, 0], cases


def assert_same(cache, heads, row: int) -> None:
    for layer, of_layer in enumerate(heads):
        for head, one in enumerate(of_layer):
            for tier, expected in ((HIGH, one.high), (LOW, one.low)):
                held = tier_tokens(cache, layer, row, head, tier)
                assert held.positions.tolist() == [t.position for t in expected]
                np.testing.assert_allclose(held.scores, [t.score for t in expected], rtol=1e-2, atol=1e-4)
                if expected:  # where the model's own rounding differs, a value may fall to the next code
                    off = np.abs(held.key - np.stack([t.key for t in expected]))
                    assert (off > 2e-3).mean() < 2e-3
                    assert off.max() < 0.5


def test_a_short_second_prompt_counts_only_its_own_queries():
    """Whatever it follows, quantised or not yet: the mean is over these, not over the 64 that a longer one has."""
    tokens = prompt(208, seed=1)
    mass = dense_run(tokens)[1][:, :, -8:].sum(2).reshape(CONFIG.num_layers, CONFIG.num_kv_heads, GROUP, -1).max(2)
    age = 208 - np.arange(208)
    cache = empty(POLICY, 1)
    for part in (tokens[:200], tokens[200:]):
        cache, _ = read(cache, *padded([part]), POLICY)
    held = jax.jit(contents)(cache)
    np.testing.assert_allclose(
        held.scores[:, 0, :, :208] / np.minimum(age, 64), mass / np.minimum(age, 8), rtol=1e-3, atol=1e-6
    )
    cache, _ = compressed(EVERYTHING, [tokens[:200]])
    cache, _ = read(cache, *padded([tokens[200:]]), EVERYTHING)
    held = jax.jit(contents)(cache)
    assert (np.asarray(held.positions)[..., :136] == 144).all()  # 64 before the end
    mean = np.asarray(held.scores)[:, 0, :, :208] / np.minimum(age, 64)
    assert 0.9 < mean[..., :200].sum() / (mass[..., :200] / 8).sum() < 1.1  # but for what quantising did


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        LeanKV(high_threshold=2.0, low_threshold=0.0, protected_window=8, block_tokens=8),
        LeanKV(high_threshold=0.5, low_threshold=0.5, protected_window=16, block_tokens=8),
        LeanKV(
            high_threshold=1.5,
            low_threshold=0.6,
            protected_window=12,
            block_tokens=16,
            high=Format.named("K8V4/1,2"),
            low=Format.named("K4V2/2,4"),
        ),
    ],
    ids=["usual", "never prunes", "one tier", "groups"],
)
def test_prompt_and_decoding_equal_the_plain_method(policy):
    tokens = prompt(120, seed=5)
    cache, logits = compressed(policy, [tokens])
    np.testing.assert_allclose(logits[0], dense_run(tokens)[0][-1], atol=1e-4)
    heads = oracle(policy, tokens)
    assert_same(cache, heads, 0)
    token, seen = int(np.argmax(logits[0])), set()
    for position in range(120, 150):
        expected, cases = oracle_step(heads, token, position)
        cache, logits = step(cache, jnp.array([token]), policy)
        np.testing.assert_allclose(logits[0], expected, atol=5e-3)
        seen |= set(cases)
        token = int(np.argmax(expected))
    assert_same(cache, heads, 0)
    assert len(seen) > 1
