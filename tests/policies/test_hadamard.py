"""KVs turned before they are quantised: nothing else changes, and keys with outlier channels lose less."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles.tiers import dequantize, quantize
from scipy.linalg import hadamard
from test_gate import WEIGHTS
from tiering import UNIFORM

from jaxkv import Gate, LearnedGate, MaxTokens, Policy, Ratio, TwoPrecisions, compress, decode_step, look_ahead, prefill
from jaxkv.cache.contents import contents, read_layer
from jaxkv.policies import LeanKV
from pallas_kernels.quantised_block import Format
from pallas_kernels.quantised_block.hadamard import matrix, turned

pytestmark = pytest.mark.once

TURNED = replace(UNIFORM, hadamard=True)
IDS = tiny.prompt(100, seed=2)


@pytest.mark.parametrize("size", [16, 64, 96, 128])
def test_turning_twice_is_not_at_all(size):
    x = np.random.default_rng().standard_normal((3, size)).astype(np.float32)
    part = size & -size
    wanted = (x.reshape(3, -1, part) @ hadamard(part) / np.sqrt(part)).reshape(3, size)
    np.testing.assert_allclose(turned(jnp.asarray(x)), wanted, atol=1e-5)
    np.testing.assert_allclose(turned(turned(jnp.asarray(x))), x, atol=1e-5)
    np.testing.assert_array_equal(matrix(size), matrix(size).T)


@partial(jax.jit, static_argnames="policy")
def read(cache, ids, policy):
    return prefill(tiny.MODEL, cache, ids[None], jnp.array([ids.shape[0]]), policy, chunk=64)


@partial(jax.jit, static_argnames="policy")
def then(cache, policy):
    """Logits of a step, and of a look ahead, after compression or without."""
    token, active = jnp.array([7]), jnp.array([True])
    ahead = tiny.MODEL.logits(look_ahead(tiny.MODEL, cache, token[:, None]))[0, 0]
    return ahead, decode_step(tiny.MODEL, cache, token, active, policy)[1][0]


def cache_for(policy):
    return tiny.empty_cache(layout=policy.placement.layout(16))


def test_logits_are_those_of_the_plain_model():
    dense = tiny.dense_run(np.array([*IDS, 7]))[0]
    cache, logits = read(cache_for(TURNED), jnp.asarray(IDS), TURNED)
    np.testing.assert_allclose(logits[0], dense[99], atol=2e-4)
    keys, _ = read_layer(cache, contents(cache), 0)
    plain, _ = read(cache_for(UNIFORM), jnp.asarray(IDS), UNIFORM)
    others, _ = read_layer(plain, contents(plain), 0)
    np.testing.assert_allclose(keys[..., :100, :], others[..., :100, :] @ matrix(16), atol=1e-4)
    for found in then(cache, None):  # nothing is quantised yet
        np.testing.assert_allclose(found, dense[100], atol=2e-4)
    for found in then(jax.jit(compress, static_argnames="policy")(cache, TURNED), TURNED):
        np.testing.assert_allclose(found, dense[100], atol=0.15)


def test_what_is_stored_is_what_was_turned():
    policy = LeanKV(high_threshold=0.0, low_threshold=0.0, high=Format.named("K4V4"), block_tokens=8, hadamard=True)
    cache, _ = read(cache_for(policy), jnp.asarray(IDS), policy)
    before, _ = read_layer(cache, contents(cache), 1)
    cache = jax.jit(compress, static_argnames="policy")(cache, policy)
    now = contents(cache)
    after, places = np.asarray(read_layer(cache, now, 1)[0])[0, 0], np.asarray(now.index)[1, 0, 0]
    for place in range(0, 100, 7):
        wanted = dequantize(*quantize(np.asarray(before)[0, 0, places[place]], 4, 1))
        np.testing.assert_allclose(after[place], wanted, atol=1e-5)


def test_scorers_see_kvs_as_they_were_computed():
    found = []
    for hadamard_too in (False, True):
        placement = TwoPrecisions(block_tokens=16, hadamard=hadamard_too)
        policy = Policy(budget=Ratio(ratio=3), scorer=LearnedGate(weights=WEIGHTS), placement=placement)
        cache, _ = read(cache_for(policy), jnp.asarray(IDS), policy)
        found.append(np.asarray(contents(cache).scores)[..., :100])
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-3)


def test_outlier_channels_cost_less_once_they_are_turned():
    rng = np.random.default_rng()
    keys = rng.standard_normal((50, 64)).astype(np.float32)
    keys[:, rng.choice(64, 2, replace=False)] *= 20
    error = [np.mean([np.square(k - dequantize(*quantize(k, 4, 1))) for k in x]) for x in (keys, keys @ matrix(64))]
    assert error[1] < 0.5 * error[0]


def test_caches_of_the_two_kinds_are_told_apart():
    gate = Gate(budget=MaxTokens(tokens=64), weights=WEIGHTS)
    with pytest.raises(ValueError, match="give CacheConfig the layout"):
        compress(cache_for(gate), replace(gate, hadamard=True))
