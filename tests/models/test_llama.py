"""The model itself: what it promises its callers, whatever the weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.checkpoints.assemble import abstract_model
from models.interface import causal_attention
from models.llama import Llama
from models.rope import RopeScaling, rotate, rotation


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_logits_are_float32_over_the_vocabulary(tiny_model, forward, tokens, tie_embeddings):
    logits = forward(tiny_model(tie_embeddings=tie_embeddings), tokens)
    assert logits.shape == (*tokens.shape, 160)
    assert logits.dtype == np.float32


def test_attend_sees_each_layer_once_in_order_with_kv_heads_unrepeated(tiny_model, tokens):
    def attend(state, layer, query, key, value):
        assert query.shape == (2, 32, 4, 16)
        assert key.shape == value.shape == (2, 32, 2, 16)
        return [*state, layer], query

    state, hidden = tiny_model()(jnp.asarray(tokens), positions_of(tokens), attend, [])
    assert state == [0, 1]
    assert hidden.shape == (2, 32, 64)


def test_a_later_token_changes_nothing_before_it(tiny_model, forward, tokens):
    model, changed = tiny_model(), tokens.copy()
    changed[:, 20] += 1
    before, after = forward(model, tokens), forward(model, changed)
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert np.abs(before[:, 20:] - after[:, 20:]).max() > 0.01


def test_a_token_at_a_time_with_a_cache_gives_the_same_logits(tiny_model, forward, tokens):
    model = tiny_model(qk_norm=True)

    def attend(cache, layer, query, key, value):
        old = cache.get(layer)
        keys = key if old is None else jnp.concatenate([old[0], key], 1)
        values = value if old is None else jnp.concatenate([old[1], value], 1)
        padded = jnp.pad(query, ((0, 0), (keys.shape[1] - 1, 0), (0, 0), (0, 0)))
        out = causal_attention(None, layer, padded, keys, values)[1][:, -1:]
        return {**cache, layer: (keys, values)}, out

    cache, steps = {}, []
    for position in range(6):
        token = jnp.asarray(tokens[:, position : position + 1])
        cache, hidden = model(token, jnp.full_like(token, position), attend, cache)
        steps.append(model.logits(hidden))
    np.testing.assert_allclose(jnp.concatenate(steps, 1), forward(model, tokens)[:, :6], atol=1e-4)


def test_only_distances_matter_to_attention(tiny_model, tokens):
    model, tokens = tiny_model(), jnp.asarray(tokens)
    here = model(tokens, positions_of(tokens), causal_attention, None)[1]
    there = model(tokens, positions_of(tokens) + 100, causal_attention, None)[1]
    np.testing.assert_allclose(here, there, atol=1e-3)


def test_rotation_turns_pair_i_with_its_partner_half_a_head_away():
    x = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)
    turned = rotate(x, rotation(jnp.asarray([[3]]), head_dim=8, theta=100.0, scaling=None))[0, 0, 0]
    angle = 3 * 100.0 ** (-2 / 8)
    np.testing.assert_allclose(turned[jnp.asarray([1, 5])], [np.cos(angle), np.sin(angle)], rtol=1e-6)
    assert float(jnp.abs(turned).sum()) == pytest.approx(abs(np.cos(angle)) + abs(np.sin(angle)))


def test_linear_scaling_is_a_slower_clock():
    scaling = RopeScaling.linear(head_dim=16, factor=4.0)
    slowed = rotation(jnp.asarray([[8]]), head_dim=16, theta=1e4, scaling=scaling)
    plain = rotation(jnp.asarray([[2]]), head_dim=16, theta=1e4, scaling=None)
    np.testing.assert_allclose(slowed, plain, rtol=1e-5)


def test_causal_attention_is_softmax_over_repeated_kv_heads():
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 7, 6, 8))
    key, value = (jax.random.normal(k, (2, 7, 3, 8)) for k in keys[1:])
    state, out = causal_attention("kept", 0, query, key, value)
    assert state == "kept"
    for head in range(6):
        scores = np.einsum("bqd,bkd->bqk", query[:, :, head], key[:, :, head // 2]) / np.sqrt(8)
        weights = np.exp(scores) * np.tri(7)
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(out[:, :, head], weights @ np.asarray(value[:, :, head // 2]), atol=1e-5)


def test_causal_attention_trains(tiny_model, tokens):
    graph, state = nnx.split(tiny_model(tie_embeddings=True))

    def loss(state):
        model = nnx.merge(graph, state)
        hidden = model(jnp.asarray(tokens), positions_of(tokens), causal_attention, None)[1]
        log_probabilities = jax.nn.log_softmax(model.logits(hidden)[:, :-1])
        return -jnp.take_along_axis(log_probabilities, jnp.asarray(tokens)[:, 1:, None], -1).mean()

    before, gradient = jax.jit(jax.value_and_grad(loss))(state)
    after = loss(jax.tree.map(lambda weight, slope: weight - 0.05 * slope, state, gradient))
    assert all(bool(jnp.isfinite(leaf).all()) and bool((leaf != 0).any()) for leaf in jax.tree.leaves(gradient))
    assert after < before


def test_bfloat16_parameters_stay_bfloat16_and_come_close(tiny_model, forward, tokens):
    model = tiny_model()
    narrow = Llama(model.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model))
    nnx.update(narrow, state)
    hidden = narrow(jnp.asarray(tokens), positions_of(tokens), causal_attention, None)[1]
    assert hidden.dtype == jnp.bfloat16
    wide = forward(model, tokens)
    assert np.abs(forward(narrow, tokens) - wide).max() < 0.05 * np.abs(wide).max()


def test_an_abstract_model_is_the_one_that_initialisation_would_give(tiny_model):
    config = replace(tiny_model().config, num_layers=3, qk_norm=True, attention_bias=True)
    traced = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    graph, expected = nnx.split(traced)
    found_graph, found = nnx.split(abstract_model(Llama, config, jnp.bfloat16))
    assert found_graph == graph
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)


def test_config_is_hashable_and_comparable(tiny_model):
    config = tiny_model().config
    assert hash(replace(config)) == hash(config)
    assert replace(config, max_context=8) != config
