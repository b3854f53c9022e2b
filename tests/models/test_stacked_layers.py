"""A model whose layers are stacked and scanned gives what the unrolled one gives."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import CheckpointError, Llama, causal_attention, stack_layers
from models.checkpoints import orbax
from models.checkpoints.assemble import abstract_model


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@pytest.mark.parametrize(
    "variant",
    [{}, {"attention_bias": True, "output_bias": True}, {"qk_norm": True}, {"tie_embeddings": True, "num_layers": 1}],
)
def test_logits_are_the_unrolled_models(tiny_model, forward, tokens, variant):
    variant = {"num_layers": 4, **variant}
    unrolled = forward(tiny_model(**variant), tokens)
    scanned = forward(stack_layers(tiny_model(**variant)), tokens)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-5)


def test_logits_are_the_same_outside_jit_and_in_bfloat16(tiny_model, tokens):
    def hidden(model):
        return model(jnp.asarray(tokens), positions_of(tokens), causal_attention, None)[1]

    def model():
        return Llama(tiny_model().config, rngs=nnx.Rngs(3), dtype=jnp.bfloat16)

    unrolled, scanned = hidden(model()), hidden(stack_layers(model()))
    assert scanned.dtype == jnp.bfloat16
    scale = float(jnp.abs(unrolled).max())
    np.testing.assert_allclose(np.float32(scanned), np.float32(unrolled), atol=0.02 * scale)


def test_layers_are_visited_in_order_and_the_state_is_carried(tiny_model, tokens):
    """Each layer writes its keys at the place that the state, not `layer`, counts out."""

    def attend(state, layer, query, key, value):
        step, seen, keys = state
        _, out = causal_attention(None, layer, query, key, value)
        return (step + 1, seen.at[step].set(layer), keys.at[step].set(key)), out

    def run(model):
        start = (jnp.int32(0), jnp.full(5, -1), jnp.zeros((5, 2, 32, 2, 16)))
        return model(jnp.asarray(tokens), positions_of(tokens), attend, start)[0]

    unrolled, scanned = run(tiny_model(num_layers=5)), run(stack_layers(tiny_model(num_layers=5)))
    assert int(scanned[0]) == 5
    assert scanned[1].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(scanned[2], unrolled[2], rtol=1e-5, atol=1e-5)


def test_attend_is_traced_once_with_a_traced_layer(tiny_model, tokens):
    layers = []

    def attend(state, layer, query, key, value):
        layers.append(layer)
        return state, query

    stack_layers(tiny_model(num_layers=6))(jnp.asarray(tokens), positions_of(tokens), attend, None)
    assert len(layers) == 1
    assert isinstance(layers[0], jax.core.Tracer)
    assert (layers[0].shape, layers[0].dtype) == ((), jnp.int32)


def test_a_donated_state_is_updated_in_place(tiny_model, tokens):
    graph, weights = nnx.split(stack_layers(tiny_model(num_layers=3)))

    def attend(pool, layer, query, key, value):
        return pool.at[layer, :64].set(key.reshape(64, 32)), query

    def step(weights, pool, tokens):
        return nnx.merge(graph, weights)(tokens, positions_of(tokens), attend, pool)

    pool = jnp.zeros((3, 100_000, 32))
    memory = jax.jit(step, donate_argnums=1).lower(weights, pool, jnp.asarray(tokens)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= pool.nbytes
    assert memory.temp_size_in_bytes < pool.nbytes / 10


def test_the_layers_own_weights_are_given_up(tiny_model):
    def live():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    model = tiny_model(num_layers=4)
    before = live()
    stacked = stack_layers(model)
    assert stacked is model
    assert live() == before
    assert stacked.layers.attention.query.kernel.shape == (4, 64, 64)


def test_stacking_again_changes_nothing(tiny_model):
    model = stack_layers(tiny_model())
    layers = model.layers
    assert stack_layers(model).layers is layers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_abstract_model_stacks_and_compiles_without_weights(tiny_model, tokens, dtype):
    config = tiny_model(qk_norm=True, attention_bias=True).config
    model = stack_layers(abstract_model(Llama, config, dtype))
    graph, weights = nnx.split(model)
    built = nnx.eval_shape(lambda: stack_layers(Llama(config, rngs=nnx.Rngs(0), dtype=dtype)))
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(weights)]
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nnx.state(built))]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(weights))

    def step(weights, tokens):
        return nnx.merge(graph, weights)(tokens, positions_of(tokens), causal_attention, None)[1]

    out = jax.jit(step).lower(weights, jax.ShapeDtypeStruct(tokens.shape, jnp.int32)).compile().out_info
    assert (out.shape, out.dtype) == ((2, 32, 64), dtype)


def test_gradients_are_the_unrolled_models(tiny_model, tokens):
    def gradient(model):
        graph, weights = nnx.split(model)

        def loss(weights):
            model = nnx.merge(graph, weights)
            hidden = model(jnp.asarray(tokens), positions_of(tokens), causal_attention, None)[1]
            return jax.nn.logsumexp(model.logits(hidden), axis=-1).mean()

        return nnx.merge(graph, jax.jit(jax.grad(loss))(weights))

    unrolled, scanned = gradient(tiny_model()), gradient(stack_layers(tiny_model()))
    for index, layer in enumerate(unrolled.layers):
        expected, found = layer.feed_forward.up.kernel[...], scanned.layers.feed_forward.up.kernel[index]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_a_stacked_model_is_not_saved(tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"stacked.*before"):
        orbax.save(stack_layers(tiny_model()), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
