"""What a model and its caller are to each other: specs, sizes, and a port that knows nothing but the interface."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import AttentionSpec, CheckpointError, Decoder, ModelSizes, Rotary, causal_attention, stack_layers
from models.interface import FULL, check_supported
from models.layers import rotate
from models.rope import RopeScaling
from tests.models.granite import TINY_GRANITE, Granite

SIZES = ModelSizes(vocab_size=10, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, max_context=16)


@pytest.fixture(scope="module")
def granite() -> Granite:
    return Granite(TINY_GRANITE, rngs=nnx.Rngs(0))


def test_llama_and_a_port_are_decoders_with_a_rotation(tiny_model, granite):
    for model in (tiny_model(), granite, stack_layers(tiny_model())):
        assert isinstance(model, Decoder)
        assert isinstance(model, Rotary)
        assert isinstance(model.sizes, ModelSizes)
        assert model.sizes is model.config
    assert not isinstance(causal_attention, Decoder)


def test_a_decoder_without_rotary_positions_is_no_rotary_one():
    class Learned:
        sizes = SIZES

        def __call__(self, tokens, positions, attend, state): ...

        def logits(self, hidden): ...

    assert isinstance(Learned(), Decoder)
    assert not isinstance(Learned(), Rotary)


def test_rotation_is_what_the_layers_turn_their_keys_by(tiny_model, tokens):
    model = tiny_model(num_layers=1, rope_scaling=RopeScaling.linear(head_dim=16, factor=2.0))

    def keys_at(positions):
        def attend(state, layer, query, key, value):
            return key, query

        return model(jnp.asarray(tokens), positions, attend, None)[0]

    zeros = jnp.zeros(tokens.shape, jnp.int32)
    positions = zeros + jnp.arange(tokens.shape[1])
    cos, sin = model.rotation(0, positions)
    assert cos.shape == sin.shape == (*tokens.shape, 1, 8)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(keys_at(positions), rotate(keys_at(zeros), (cos, sin)), atol=1e-5)


def test_only_a_spec_that_changes_nothing_is_plain():
    assert AttentionSpec() == FULL
    assert FULL.plain
    assert not any(
        spec.plain for spec in (AttentionSpec(window=4), AttentionSpec(softcap=30.0), AttentionSpec(scale=1.0))
    )


@pytest.mark.parametrize("spec", [AttentionSpec(window=1024), AttentionSpec(softcap=50.0), AttentionSpec(scale=0.1)])
def test_what_no_attend_computes_is_refused_by_layer(tiny_model, spec):
    message = r"layer 1 has .*(1024|50\.0|0\.1).*expected AttentionSpec\(window=None.*folded into the queries"
    check_supported((FULL, FULL))
    with pytest.raises(CheckpointError, match=message):
        check_supported((FULL, spec))
    for sizes in (SIZES, tiny_model().config, TINY_GRANITE):
        assert replace(sizes, specs=(FULL, FULL)).specs == (FULL, FULL)
        with pytest.raises(CheckpointError, match=message):
            replace(sizes, specs=(FULL, spec))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"specs": (FULL,)}, "1 layers' attention, expected num_layers=2 or none"),
        ({"num_kv_heads": 3}, "multiple of KV heads.*num_kv_heads=3"),
        ({"hidden_size": 0}, "hidden_size is 0, expected 1"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
    ],
)
def test_sizes_that_do_not_belong_together_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        replace(SIZES, **changes)


def test_a_ported_model_stacks(granite, tokens, forward):
    scanned = forward(stack_layers(Granite(TINY_GRANITE, rngs=nnx.Rngs(0))), tokens)
    np.testing.assert_allclose(scanned, forward(granite, tokens), rtol=1e-5, atol=1e-5)
