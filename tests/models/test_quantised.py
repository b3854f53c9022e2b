"""Weights as codes with scales, against the same matrix widened by NumPy."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from models import CheckpointError, load_model, quantised, stack_layers
from models.checkpoints.assemble import parameters_of
from models.checkpoints.orbax import restore, save
from models.layers import Embed, Linear, are_alike
from models.quantised import Grouped, Packed, Quantised, Scaled, quantise
from tests.models.granite import TINY_GRANITE, Granite

F8 = ml_dtypes.float8_e4m3fn


def spread(values, block, shape):
    """An entry for each code, by index."""
    rows, columns = (
        np.minimum(np.arange(size) // b, n - 1) for size, b, n in zip(shape, block, values.shape, strict=True)
    )
    return values[np.ix_(rows, columns)]


def random_scaled(rng, shape, axis, *, each=True, dtype=F8):
    codes = (rng.uniform(-100, 100, shape)).astype(dtype)
    scales = rng.uniform(0.5, 2, [n if each and a != axis else 1 for a, n in enumerate(shape)]).astype(np.float32)
    return Scaled(axis=axis, codes=codes, scales=scales), codes.astype(np.float32) * scales


def random_grouped(rng, shape, axis, block, *, bits=None, zeros=False, offsets=False, order=False):
    blocks = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    codes = rng.integers(0, 2 ** (bits or 7), shape).astype(np.uint8)
    scales = rng.uniform(0.5, 2, blocks).astype(np.float16)
    expected = codes.astype(np.float32)
    parts = {}
    if zeros:
        parts["zeros"] = rng.integers(0, 9, blocks).astype(np.int8)
        expected = expected - spread(parts["zeros"], block, shape)
    expected = expected * spread(scales.astype(np.float32), block, shape)
    if offsets:
        parts["offsets"] = rng.uniform(-2, 2, blocks).astype(np.float32)
        expected = expected + spread(parts["offsets"], block, shape)
    if order:
        parts["order"] = rng.permutation(shape[axis]).astype(np.int32)
        expected = np.take(expected, np.argsort(parts["order"]), axis)
    held = Packed.of(codes, bits=bits, axis=axis) if bits else codes
    return Grouped(axis=axis, codes=held, scales=scales, block=block, **parts), expected.astype(np.float32)


@st.composite
def matrices(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    axis = draw(st.sampled_from([0, 1]))
    inputs, outputs = 8 * draw(st.integers(1, 12)), draw(st.integers(2, 70))
    shape = (inputs, outputs) if axis == 0 else (outputs, inputs)
    if draw(st.booleans()):
        dtype = draw(st.sampled_from([F8, np.int8]))
        return axis, *random_scaled(rng, shape, axis, each=draw(st.booleans()), dtype=dtype)
    block = draw(st.sampled_from([8, 16, 12])), draw(st.sampled_from([1, 5, 16]))
    options = {name: draw(st.booleans()) for name in ("zeros", "offsets", "order")}
    bits = draw(st.sampled_from([None, 4, 5, 6]))
    return axis, *random_grouped(rng, shape, axis, block if axis == 0 else block[::-1], bits=bits, **options)


@settings(max_examples=25)
@given(matrix=matrices(), part=st.sampled_from([1, 300, 2**22]))
def test_products_rows_and_parts_are_those_of_the_widened_matrix(matrix, part):
    axis, held, expected = matrix
    assert held.fault(expected.shape) is None
    x = np.random.default_rng(1).standard_normal((2, 3, held.shape[axis])).astype(np.float32)
    product = x.astype(np.float64) @ (expected if axis == 0 else expected.T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "_PART", part)
        for each, turned in ((held, expected), (held.transposed(), expected.T)):
            on_device = jax.device_put(each)
            np.testing.assert_allclose(on_device.widened(), turned, rtol=1e-6, atol=1e-5)
            found = on_device.product(jnp.asarray(x), jnp.float32)
            np.testing.assert_allclose(found, product, rtol=1e-5, atol=1e-5 * np.abs(product).max())
            assert on_device.product(jnp.asarray(x), jnp.bfloat16).dtype == jnp.bfloat16
    table, rows = (held, expected) if axis == 1 else (held.transposed(), expected.T)
    ids = np.random.default_rng(2).integers(0, len(rows), (2, 3))
    np.testing.assert_allclose(jax.device_put(table).rows(jnp.asarray(ids)), rows[ids], rtol=1e-6, atol=1e-5)
    start = 16 * 5 * (len(rows) // 160)
    np.testing.assert_allclose(table.part(start, len(rows) - start).widened(), rows[start:], rtol=1e-6, atol=1e-5)


@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([4, 5, 6]), axis=st.sampled_from([0, 1]))
def test_packed_codes_come_back_and_take_their_bits(seed, bits, axis):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (24, 40)).astype(np.uint8)
    packed = Packed.of(codes, bits=bits, axis=axis)
    np.testing.assert_array_equal(packed.unpacked(), codes)
    assert sum(array.nbytes for array in jax.tree.leaves(packed)) == codes.size * bits // 8


def test_no_program_holds_the_widened_matrix():
    """But a part of it at a time."""
    shape = 512, 65_536
    held, _ = random_grouped(np.random.default_rng(0), shape, 0, (128, 1), bits=4)
    product = jax.jit(lambda held, x: held.product(x, jnp.float32))
    compiled = product.lower(held, jnp.zeros((2, shape[0]))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * quantised._PART < 4 * held.shape[0] * held.shape[1]


@pytest.mark.parametrize(("kind", "step"), [("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_quantising_comes_within_half_a_step(kind, step):
    values = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32) * np.geomspace(1e-6, 1e6, 40)
    values = values.astype(np.float32)
    values[:, 7] = 0
    held = quantise(values, kind, axis=0)
    largest = np.abs(values).max(0)
    error = np.abs(np.asarray(held.widened()) - values)
    bound = largest * step if kind == "int8" else np.maximum(np.abs(values) * step, largest * 2.0**-10 / 448)
    assert (error <= bound * 1.001 + 1e-30).all()
    np.testing.assert_array_equal(held.transposed().codes, quantise(values.T, kind, axis=1).codes)


def test_the_smallest_and_largest_floats_are_quantised():
    values = np.array([[1e-45, 3e38, 0, -1e-38], [0, -3e38, 0, 1e-38]], np.float32)
    for kind in ("int8", "fp8"):
        assert np.isfinite(quantise(values, kind, axis=0).widened()).all()


def test_layers_take_codes_for_floats(tokens):
    rng = np.random.default_rng(0)
    kernel, exact = random_scaled(rng, (16, 8), 0)
    table, rows = random_grouped(rng, (40, 16), 1, (1, 8))
    linear = Linear(16, 8, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
    embed = Embed(40, 16, rngs=nnx.Rngs(0))
    x = embed(jnp.arange(5))
    linear.kernel.set_value(jax.device_put(kernel))
    embed.embedding.set_value(jax.device_put(table))
    np.testing.assert_allclose(linear(x), x @ exact + linear.bias[...], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(linear.logits(x), x @ exact, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(embed(jnp.arange(5)), rows[:5], rtol=1e-6)
    np.testing.assert_allclose(embed.logits(x), x @ rows.T, rtol=1e-5, atol=1e-4)


def widened_twin(model):
    """The same model with floats for codes."""
    graph, state = nnx.split(model)
    twin = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    count = 0
    for leaf in parameters_of(twin).values():
        if isinstance(value := leaf.get_value(), Quantised):
            codes, scales = np.asarray(value.codes).astype(np.float32), np.asarray(value.scales)
            leaf.set_value(jnp.asarray(codes * scales))
            count += 1
    return twin, count


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "attention_bias": True, "output_bias": True}])
def test_a_model_quantised_at_load_is_that_of_its_widened_weights(kind, changes, tiny_model, tmp_path, tokens, forward):
    exact = tiny_model(**changes)
    save(exact, tmp_path / "exact")
    model = load_model(tmp_path / "exact", weights=kind)
    twin, count = widened_twin(model)
    assert count == 14 + (0 if kind == "fp8" else 1 if "tie_embeddings" in changes else 2)
    logits = forward(model, tokens)
    np.testing.assert_allclose(logits, forward(twin, tokens), atol=1e-5 * np.abs(logits).max())
    error = (logits - forward(exact, tokens)).std() / logits.std()
    assert 0 < error < {"int8": 0.1, "fp8": 0.3}[kind]
    assert are_alike(model)
    np.testing.assert_allclose(forward(stack_layers(model), tokens), logits, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_codes_are_saved_and_restored(kind, tiny_model, tmp_path, tokens, forward):
    save(tiny_model(), tmp_path / "exact")
    model = load_model(tmp_path / "exact", weights=kind)
    save(model, tmp_path / "saved")
    stored = restore(tmp_path / "saved", weights="stored")
    np.testing.assert_array_equal(forward(stored, tokens), forward(model, tokens))
    assert stored.layers[0].attention.query.kernel.get_value().codes.dtype.itemsize == 1
    floats = restore(tmp_path / "saved")
    assert not any(isinstance(leaf.get_value(), Quantised) for leaf in parameters_of(floats).values())
    np.testing.assert_allclose(forward(floats, tokens), forward(model, tokens), atol=1e-5)


def test_packed_groups_are_saved_and_restored(tiny_model, tmp_path, tokens, forward):
    model = tiny_model()
    held, _ = random_grouped(np.random.default_rng(0), (96, 64), 0, (8, 1), bits=5, zeros=True, order=True)
    model.layers[1].feed_forward.down.kernel.set_value(jax.device_put(held))
    assert not are_alike(model)
    with pytest.raises(ValueError, match="different formats"):
        stack_layers(model)
    save(model, tmp_path / "saved")
    np.testing.assert_array_equal(
        forward(restore(tmp_path / "saved", weights="stored"), tokens), forward(model, tokens)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(form="Scale"), "`save` didn't write"),
        (lambda d: d.update(axis=2), "`save` didn't write"),
        (lambda d: d.update(axis="0"), "`save` didn't write"),
        (lambda d: d["arrays"].pop("scales"), "`save` didn't write"),
        (lambda d: d["arrays"].update(zeros=None), "zeros"),
        (lambda d: d.update(axis=1), "scales of shape"),
    ],
)
def test_a_wrong_description_of_codes_is_named(change, message, tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "exact")
    save(load_model(tmp_path / "exact", weights="int8"), tmp_path / "saved")
    path = tmp_path / "saved" / "quantised.json"
    described = json.loads(path.read_text())
    change(described["layers.0.attention.key.kernel"])
    path.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path / "saved", weights="stored")


def test_a_model_ported_with_flax_own_layers_runs_too(tokens, forward):
    """Its kernels are widened whole, since flax knows no other way."""
    model = Granite(TINY_GRANITE, rngs=nnx.Rngs(0))
    for path, leaf in parameters_of(model).items():
        if path[-1] in ("kernel", "embedding"):
            axis = {"kernel": 0, "embedding": 1}[path[-1]]
            leaf.set_value(jax.device_put(quantise(np.asarray(leaf[...]), "int8", axis=axis)))
    twin, count = widened_twin(model)
    assert count == 15
    np.testing.assert_allclose(forward(model, tokens), forward(twin, tokens), atol=1e-5)


def test_rows_are_of_tables_alone():
    kernel, _ = random_scaled(np.random.default_rng(0), (8, 8), 0)
    with pytest.raises(ValueError, match="tables"):
        kernel.rows(jnp.zeros(2, jnp.int32))


def test_parts_that_do_not_belong_together_are_said():
    rng = np.random.default_rng(0)
    scaled, _ = random_scaled(rng, (8, 6), 0)
    assert "codes of shape" in scaled.fault((6, 8))
    assert "scales of shape" in replace(scaled, scales=np.ones((1, 8), np.float32)).fault((8, 6))
    grouped, _ = random_grouped(rng, (16, 6), 0, (8, 1), order=True, offsets=True)
    assert "codes of shape" in grouped.fault((6, 16))
    assert "scales of shape" in replace(grouped, scales=np.ones((3, 6))).fault((16, 6))
    assert "offsets of shape" in replace(grouped, offsets=np.ones((2, 5))).fault((16, 6))
    assert "order of shape" in replace(grouped, order=np.arange(8)).fault((16, 6))
    nested = replace(grouped, scales=replace(grouped, order=None))
    assert "in its scales" in nested.fault((16, 6))


def test_unknown_weights_are_refused(tmp_path, tiny_model):
    save(tiny_model(), tmp_path / "saved")
    with pytest.raises(ValueError, match="floats, stored, int8, fp8, got 'int4'"):
        load_model(tmp_path / "saved", weights="int4")
