"""Texts that go on long past their budget: bytes, blocks and positions hold, KVs decline as told, and none freezes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.tiers import dequantize, quantize
from test_gate import WEIGHTS
from tiering import conserved

from jaxkv import CacheConfig, Gate, Greedy, KVCompress, MaxTokens, Mixed, compress, decode, init_cache, prefill
from jaxkv.cache.contents import contents, read_layer
from jaxkv.cache.home import GONE, HIGH, LOW, RAW
from jaxkv.generation.compress import compress_again
from jaxkv.generation.sampling import Forced
from jaxkv.policies import LeanKV

pytestmark = pytest.mark.once

HEADS = 4
EVERY, WINDOW, SINKS = 16, 6, 2
COMMON = {"budget": MaxTokens(tokens=48), "protected_window": WINDOW, "compress_every": EVERY}
TIERS = {**COMMON, "block_tokens": 8}


def cache_for(policy, max_context=512):
    sizes = {"batch": 1, "max_context": max_context, "block_size": 8}
    return init_cache(CacheConfig.for_model(tiny.CONFIG, layout=policy.placement.layout(16), **sizes))


@partial(jax.jit, static_argnames="policy", donate_argnums=0)
def read(cache, ids, policy):
    return prefill(tiny.MODEL, cache, ids[None], jnp.array([ids.shape[0]]), policy)[0]


@partial(jax.jit, static_argnames=("steps", "policy"), donate_argnums=0)
def forced(cache, ids, steps, policy):
    """Caches the first so many of the tokens, one after the other."""
    told = Forced(sampler=Greedy(), tokens=ids[None, 1:], first=cache.num_tokens + 1)
    return decode(tiny.MODEL, cache, ids[:1], jnp.array([steps]), steps=steps, policy=policy, sampler=told).cache


@partial(jax.jit, static_argnames="policy")
def shrink(cache, policy, room):
    return compress_again(cache, policy, room=room)


once, again = (jax.jit(verb, static_argnames="policy") for verb in (compress, compress_again))


@jax.jit
def all_kvs(cache):
    """Homes, scores, positions and K and V ``[layers, kv_heads, kvs, ...]``."""
    now = contents(cache)
    keys, values = zip(*(read_layer(cache, now, layer) for layer in range(2)), strict=True)
    return [x[:, 0] for x in (now.home, now.scores, now.positions, jnp.stack(keys), jnp.stack(values))]


def by_head(cache):
    """Of each head, by position: home, score, K and V."""
    home, *rest = jax.device_get(all_kvs(cache))
    heads = []
    for at in np.ndindex(2, 2):
        held = home[at] != GONE
        scores, positions, keys, values = (part[at][held] for part in rest)
        assert len(set(positions.tolist())) == len(positions)
        kvs = zip(home[at][held], scores, keys, values, strict=True)
        heads.append(dict(zip(positions.tolist(), kvs, strict=True)))
    return heads


def as_stored(vector, bits):
    return dequantize(*quantize(vector, bits, 1))


def bytes_held(cache):
    raw, tiers = cache.raw, cache.tiers
    return (
        int(raw.tables.blocks_held().sum()) * raw.block_bytes
        + int(tiers.tables.blocks_held().sum()) * tiers.block_bytes
    )


RANKINGS = {
    "gate": Gate(**TIERS, sinks=SINKS, weights=WEIGHTS),
    "window stays": Gate(**TIERS, sinks=SINKS, weights=WEIGHTS, unquantised_window=True),
    "attention": Mixed.over(KVCompress, **TIERS, sinks=SINKS),
}


@pytest.mark.parametrize("name", RANKINGS)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**31), blocks=st.integers(14, 24))
def test_kvs_decline_within_a_fixed_budget(name, seed, blocks):
    policy, ids = RANKINGS[name], jnp.asarray(tiny.prompt(40 + 8 * EVERY + 1, seed))
    growing = replace(policy, compress_every=10_000)  # scores as ever, and never compressed by itself
    cache, room, declined = read(cache_for(policy), ids[:40], policy), jnp.array([blocks]), set()
    for start in range(40, len(ids) - EVERY + 1, EVERY):
        before = by_head(cache)
        cache = shrink(cache, policy, room)
        conserved(cache)
        tiny.assert_no_block_is_lost_or_shared(cache)
        assert bytes_held(cache) <= blocks * cache.tiers.block_bytes
        for old, new in zip(before, by_head(cache), strict=True):
            assert new.keys() <= old.keys()
            assert {*range(SINKS), *range(start - WINDOW + 1, start)} <= new.keys()
            for position, (home, score, key, value) in new.items():
                was, had, old_key, old_value = old[position]
                assert home == was or ((home, was) != (HIGH, LOW) and home < RAW)
                declined.add((int(was), int(home)))
                if home == RAW:
                    np.testing.assert_array_equal((key, value), (old_key, old_value))
                else:  # once more, from what it was decoded to
                    form = (policy.high, policy.low)[home]
                    np.testing.assert_allclose(key, as_stored(old_key, form.key_bits), rtol=1e-5, atol=1e-6)
                    np.testing.assert_allclose(value, as_stored(old_value, form.value_bits), rtol=1e-5, atol=1e-6)
                if was != RAW and name != "attention":
                    assert score == had
        cache = forced(cache, ids[start : start + EVERY + 1], EVERY, growing)
    assert {(RAW, HIGH), (HIGH, HIGH), (HIGH, LOW), (LOW, LOW)} <= declined
    assert sum(map(len, by_head(cache))) < 0.9 * HEADS * len(ids)


def test_decoding_compresses_as_told_by_hand():
    policy = RANKINGS["attention"]
    ids = jnp.asarray(tiny.prompt(48 + 2 * EVERY + 1, 5))
    start = once(read(cache_for(policy), ids[:48], policy), policy)
    whole = forced(jax.tree.map(jnp.copy, start), ids[48:], 2 * EVERY, policy)
    by_hand, growing = start, replace(policy, compress_every=10_000)
    for at in range(48, 48 + 2 * EVERY, EVERY):
        by_hand = forced(by_hand, ids[at : at + EVERY + 1], EVERY, growing)
        by_hand = again(by_hand, policy)
    for one, other in zip(by_head(whole), by_head(by_hand), strict=True):
        assert one.keys() == other.keys()
        assert [kv[0] for kv in one.values()] == [kv[0] for kv in other.values()]
        np.testing.assert_allclose([kv[1] for kv in one.values()], [kv[1] for kv in other.values()], rtol=1e-4)


LONG = {
    "gate": Gate(**TIERS, weights=WEIGHTS),
    "mixed": Mixed.over(KVCompress, **TIERS),
    "leankv": LeanKV(**TIERS),
}


@pytest.mark.parametrize("name", LONG)
def test_survivors_come_from_every_tenth_of_ten_budgets(name):
    policy, ids = LONG[name], jnp.asarray(tiny.prompt(480, 3))
    cache = once(read(cache_for(policy), ids[:48], policy), policy)
    cache = forced(cache, ids[48:], 431, policy)
    assert int(cache.num_tokens[0]) == 479
    places = np.concatenate([list(head) for head in by_head(cache)])
    tenths = np.histogram(places, 10, (0, 480))[0]
    assert len(places) < 0.45 * 480 * HEADS
    assert tenths.min() >= len(places) / 10 / 5


def test_what_sums_of_attention_fade_to():
    """After a text longer than the window and what was decoded since, a mean; of the young, what it was."""
    policy = KVCompress(**COMMON)
    ages = np.array([1, WINDOW, WINDOW + 3, WINDOW + EVERY, 400])
    scores = np.random.default_rng().random(5).astype(np.float32)
    positions, shape = 500 - ages, (1, 1, 1, 5)
    got = policy.faded(jnp.asarray(scores).reshape(shape), jnp.asarray(positions).reshape(shape), jnp.array([500]))
    wanted = scores * np.minimum(ages, WINDOW) / np.minimum(ages, WINDOW + EVERY)
    np.testing.assert_allclose(got.reshape(-1), wanted, rtol=1e-6)
    assert WINDOW / (WINDOW + EVERY) * scores[-1] == pytest.approx(float(got[..., -1].item()))
