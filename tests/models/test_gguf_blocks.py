"""GGUF's blocks kept as they are, against gguf's own dequantisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from models import CheckpointError, load_model, stack_layers
from models.checkpoints.assemble import parameters_of
from models.checkpoints.gguf_blocks import kept
from models.checkpoints.orbax import restore, save
from models.quantised import Quantised
from tests.models.test_gguf import gguf_tensors, write_gguf

Kind = GGMLQuantizationType
SCALES = {
    Kind.Q8_0: (0,),
    Kind.Q4_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_0: (0,),
    Kind.Q5_1: (0, 2),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}
"""Where a block's float16 scales are."""
LARGEST = {Kind.Q8_0: 127, Kind.Q4_0: 8, Kind.Q4_1: 15, Kind.Q5_0: 16, Kind.Q5_1: 31}
LARGEST |= {Kind.Q4_K: 15 * 63, Kind.Q5_K: 31 * 63, Kind.Q6_K: 32 * 127}


def random_blocks(kind, shape, rng, *, largest=1.0):
    """``u8[out, bytes]``: any bits, with scales so that values are up to about ``largest``."""
    size, count = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // size, count), np.uint8)
    for at in SCALES[kind]:
        scales = rng.uniform(-1, 1, blocks.shape[:2]) * largest / LARGEST[kind]
        blocks[..., at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), blocks=st.integers(1, 3))
@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_blocks_are_what_gguf_says_bit_for_bit(kind, seed, rows, blocks):
    rng, (_, count) = np.random.default_rng(seed), GGML_QUANT_SIZES[kind]
    data = random_blocks(kind, (rows, blocks * 256), rng, largest=10.0 ** rng.integers(-2, 5))
    held = kept(kind)(data.reshape(rows, -1, count))
    assert held.fault((rows, blocks * 256)) is None
    np.testing.assert_array_equal(held.widened(), dequantize(data, kind))
    np.testing.assert_array_equal(held.transposed().widened(), dequantize(data, kind).T)
    bytes_held = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    assert bytes_held <= data.nbytes * 1.03 + 1  # Q4_K's and Q5_K's scales of 6 bits take 8


def write(tiny_model, path, kind, **changes):
    """A model all of whose matrices are random blocks of a kind."""
    rng = np.random.default_rng(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_heads": 4, "head_dim": 64, "num_kv_heads": 2}
    model = tiny_model(**(sizes | changes))
    tensors = {
        name: (random_blocks(kind, value.shape, rng, largest=0.3), kind) if value.ndim == 2 else value
        for name, value in gguf_tensors(model, "llama").items()
    }
    return write_gguf(path / "model.gguf", model, tensors)


def quantised_in(model):
    return [v for leaf in parameters_of(model).values() if isinstance(v := leaf.get_value(), Quantised)]


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_logits_are_those_of_the_dequantised_model(kind, tiny_model, tmp_path, tokens, forward):
    path = write(tiny_model, tmp_path, kind, tie_embeddings=kind == Kind.Q6_K)
    stored = load_model(path, weights="stored")
    assert len(quantised_in(stored)) == (15 if kind == Kind.Q6_K else 16)
    expected = forward(load_model(path), tokens)
    np.testing.assert_allclose(forward(stored, tokens), expected, atol=1e-5 * max(1, np.abs(expected).max()))
    np.testing.assert_allclose(forward(stack_layers(stored), tokens), expected, atol=1e-5 * np.abs(expected).max())


def test_blocks_are_saved_and_restored(tiny_model, tmp_path, tokens, forward):
    stored = load_model(write(tiny_model, tmp_path, Kind.Q5_K), weights="stored")
    save(stored, tmp_path / "saved")
    loaded = restore(tmp_path / "saved", weights="stored")
    np.testing.assert_array_equal(forward(loaded, tokens), forward(stored, tokens))


def test_other_blocks_become_floats(tiny_model, tmp_path):
    model = tiny_model()
    tensors = gguf_tensors(model, "llama")
    stored = load_model(write_gguf(tmp_path / "model.gguf", model, tensors), weights="stored", dtype=jnp.bfloat16)
    assert not quantised_in(stored)
    assert stored.embed.embedding[...].dtype == jnp.bfloat16


def test_a_scale_that_is_no_number_is_named(tiny_model, tmp_path):
    rng = np.random.default_rng(0)
    model = tiny_model()
    tensors = gguf_tensors(model, "llama")
    data = random_blocks(Kind.Q8_0, (96, 64), rng)
    data[5, :2] = np.float16(np.nan).reshape(1).view(np.uint8)
    path = write_gguf(tmp_path / "model.gguf", model, tensors | {"blk.0.ffn_up.weight": (data, Kind.Q8_0)})
    for weights in ("stored", "floats", "int8"):
        with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight.*NaN or infinite"):
            load_model(path, weights=weights)
