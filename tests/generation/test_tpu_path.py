"""The whole path on TPU kernels, interpreted, and with stacked layers, against the same path on the XLA references."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxkv.cache import CacheConfig, init_cache
from jaxkv.cache.stats import stats
from jaxkv.generation.decode import generate
from jaxkv.policies import KVCompress, MaxTokens
from models import stack_layers
from pallas_kernels import use_implementation

POLICIES = {
    "windowed": KVCompress(budget=MaxTokens(tokens=48), window=8, protected_window=8),
    "full, continual": KVCompress.full(budget=MaxTokens(tokens=48), compress_every=8, protected_window=16),
}


def run(policy, model):
    tokens, lengths = tiny.padded([tiny.prompt(90, seed=1), tiny.prompt(37, seed=2)])
    config = CacheConfig.for_model(tiny.CONFIG, batch=2, max_context=160)
    assert config.row_width == init_cache(config).raw.pool.shape[-1]
    graph, weights = nnx.split(model)

    @jax.jit
    def everything(weights, cache, tokens, lengths):
        return generate(nnx.merge(graph, weights), cache, tokens, lengths, max_tokens=12, policy=policy)

    return config, everything(weights, init_cache(config), tokens, lengths)


@pytest.fixture(scope="module")
def stacked():
    graph, weights = nnx.split(tiny.MODEL)
    return stack_layers(nnx.merge(graph, jax.tree.map(jnp.copy, weights)))


@pytest.mark.parametrize("name", POLICIES)
def test_kernels_give_what_the_references_give(name, stacked):
    policy = POLICIES[name]
    plain_config, plain = run(policy, tiny.MODEL)
    with use_implementation("mosaic_tpu", interpret=True):
        config, kernels = run(policy, stacked)
    assert plain_config.row_width == 32
    assert config.row_width == 128  # 16 values each of K and V, padded to 64
    np.testing.assert_array_equal(kernels.tokens, plain.tokens)
    np.testing.assert_allclose(kernels.logprobs, plain.logprobs, atol=1e-4)
    np.testing.assert_array_equal(kernels.cache.lengths, plain.cache.lengths)
    for row in np.ndindex(plain.cache.lengths.shape):
        one, other = (tiny.by_position(c, c.raw.scores, *row) for c in (kernels.cache, plain.cache))
        assert one.keys() == other.keys()
        np.testing.assert_allclose([one[p] for p in other], list(other.values()), atol=1e-4)
    assert stats(kernels.cache).kvs_held == stats(plain.cache).kvs_held


def test_padding_is_counted_as_memory():
    with use_implementation("mosaic_tpu"):
        config = CacheConfig.for_model(tiny.CONFIG, batch=1, max_context=64)
    # The width was settled by the platform at hand when the config was made, not when it is used.
    assert config.row_width == 128
    assert config.bytes_with(8) - replace(config, padded_head_dim=16).bytes_with(8) == 8 * 16 * 96 * 4
