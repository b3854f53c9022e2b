"""GGUF files: every quantisation, the row order of q and k, RoPE factors, and damage."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from models import CheckpointError, load_model
from models.checkpoints.assemble import parameters_of
from models.checkpoints.gguf import halves_from_interleaved
from models.llama import GGUF_NAMES, Llama
from models.rope import RopeScaling

Kind = GGMLQuantizationType
# Where a block of a type that gguf can't quantise to keeps its float16 scales: (type, their byte offsets).
BLOCK_SCALES = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}
# The largest error over the largest value of a block of 32: half a step, and the rounding of a float16 scale.
STEPS = {
    Kind.F32: 0.0,
    Kind.F16: 2**-11,
    Kind.BF16: 2**-8,
    Kind.Q8_0: 1 / 254 + 2**-11,
    Kind.Q5_0: 1 / 16 + 2**-11,
    Kind.Q5_1: 1 / 31 + 2**-10,
    Kind.Q4_0: 1 / 8 + 2**-11,
    Kind.Q4_1: 1 / 15 + 2**-10,
}


def gguf_tensors(model: Llama, architecture: str) -> dict[str, np.ndarray]:
    """What llama.cpp's converter makes of the model: [out, in], q and k rows interleaved for architecture llama."""
    heads = {"attn_q": model.config.num_heads, "attn_k": model.config.num_kv_heads}
    tensors = {}
    for path, leaf in parameters_of(model).items():
        name, value = GGUF_NAMES(path, model.config).name, np.asarray(leaf[...])
        value = value.T if path[-1] == "kernel" else value
        module = name.split(".")[-2]
        if architecture == "llama" and module in heads:
            split = value.reshape(heads[module], 2, -1, *value.shape[1:])
            value = split.swapaxes(1, 2).reshape(value.shape)
        tensors[name] = np.ascontiguousarray(value)
    return tensors


def write_gguf(
    path: Path, model: Llama, tensors: dict[str, np.ndarray | tuple[np.ndarray, Kind]], architecture: str = "llama"
) -> Path:
    """Tensors are float32, or quantised bytes and their type."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {index}" for index in range(config.vocab_size)])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_embeddings": True, "attention_bias": True, "output_bias": True}),
        ("qwen2", {"attention_bias": True, "tie_embeddings": True}),
        ("qwen3", {"qk_norm": True, "head_dim": 32}),
    ],
)
def test_each_architecture_loads_as_the_model_it_was_written_from(
    architecture, changes, tiny_model, tmp_path, tokens, forward
):
    model = tiny_model(**changes)
    path = write_gguf(tmp_path / "model.gguf", model, gguf_tensors(model, architecture), architecture)
    loaded = load_model(path)
    assert loaded.config == model.config
    np.testing.assert_array_equal(forward(loaded, tokens), forward(model, tokens))


def test_rope_factors_are_honoured(tiny_model, tmp_path, tokens, forward):
    scaling = RopeScaling.llama3(
        head_dim=16, theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=64
    )
    model = tiny_model(rope_scaling=scaling)
    tensors = gguf_tensors(model, "llama") | {"rope_freqs.weight": np.asarray(scaling.divisors, np.float32)}
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model, tensors))
    np.testing.assert_allclose(forward(loaded, tokens), forward(model, tokens), atol=1e-4)
    assert np.abs(forward(loaded, tokens) - forward(tiny_model(), tokens)).max() > 0.01


@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.name)
def test_quantised_weights_come_within_half_a_step(kind, tiny_model, tmp_path):
    model = tiny_model()
    tensors = {
        name: (quantize(value, kind), kind) if value.ndim == 2 else value
        for name, value in gguf_tensors(model, "llama").items()
    }
    loaded = parameters_of(load_model(write_gguf(tmp_path / "model.gguf", model, tensors)))
    for path, leaf in parameters_of(model).items():
        exact, value = np.asarray(leaf[...]), np.asarray(loaded[path][...])
        if path[-1] != "kernel" and path[0] != "embed":
            np.testing.assert_array_equal(value, exact)
            continue
        exact, value = ((x.T if path[-1] == "kernel" else x).reshape(-1, 32) for x in (exact, value))
        largest = np.abs(exact).max(-1, keepdims=True)
        assert (np.abs(value - exact) <= largest * STEPS[kind] + 1e-6).all()


@pytest.mark.parametrize("kind", BLOCK_SCALES, ids=lambda kind: kind.name)
def test_k_quants_are_dequantised_and_transposed(kind, tiny_model, tmp_path):
    model = tiny_model(hidden_size=256, intermediate_size=64)
    tensors: dict[str, np.ndarray | tuple[np.ndarray, Kind]] = dict(gguf_tensors(model, "llama"))
    rows, width = quant_shape_to_byte_shape((64, 256), kind)
    generator = np.random.default_rng(3)
    data = generator.integers(0, 256, (rows, width), dtype=np.uint8)
    for offset in BLOCK_SCALES[kind]:
        data[:, offset : offset + 2] = generator.uniform(0.01, 0.1, (rows, 1)).astype(np.float16).view(np.uint8)
    tensors["blk.1.ffn_gate.weight"] = (data, kind)
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model, tensors))
    kernel = np.asarray(loaded.layers[1].feed_forward.gate.kernel[...])
    assert kernel.shape == (256, 64)
    np.testing.assert_array_equal(kernel, dequantize(data, kind).T)


@given(heads=st.integers(1, 4), half=st.integers(1, 5), columns=st.integers(1, 3))
def test_rows_of_a_rope_pair_end_up_half_a_head_apart(heads, half, columns):
    rows = np.arange(heads * half * 2 * columns).reshape(-1, columns)
    halves = halves_from_interleaved(rows, heads)
    for head in range(heads):
        start = head * 2 * half
        for pair in range(half):
            np.testing.assert_array_equal(halves[start + pair], rows[start + 2 * pair])
            np.testing.assert_array_equal(halves[start + half + pair], rows[start + 2 * pair + 1])


def test_a_directory_with_one_gguf_is_that_model(tiny_model, tmp_path):
    model = tiny_model()
    write_gguf(tmp_path / "model.gguf", model, gguf_tensors(model, "llama"))
    assert load_model(tmp_path, dtype=jnp.bfloat16).norm.scale[...].dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def whole_file(tiny_model, tmp_path_factory) -> bytes:
    model = tiny_model(num_layers=1, vocab_size=8)
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    return write_gguf(path, model, gguf_tensors(model, "llama")).read_bytes()


@settings(max_examples=40, deadline=None)
@given(kept=st.floats(0, 0.999))
def test_a_truncated_file_is_named(whole_file, tmp_path_factory, kept):
    path = tmp_path_factory.mktemp("truncated") / "model.gguf"
    path.write_bytes(whole_file[: int(kept * len(whole_file))])
    with pytest.raises(CheckpointError, match=r"model\.gguf .*(cut short|expected b'GGUF')"):
        load_model(path)


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_damaged_byte_gives_a_model_or_a_checkpoint_error(whole_file, tmp_path_factory, place, value):
    damaged = bytearray(whole_file)
    damaged[int(place * 2000)] = value  # the header and metadata; weights may hold any byte
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(damaged)
    try:
        model = load_model(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = str(model.config)
    assert message


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blk.1.ffn_up.weight", None, r"lacks 1 of .*blk\.1\.ffn_up\.weight"),
        ("blk.0.ffn_up.bias", np.zeros(96, np.float32), r"doesn't use.*blk\.0\.ffn_up\.bias"),
        ("blk.0.ffn_up.weight", np.zeros((64, 96), np.float32), r"ffn_up.*\(64, 96\), expected \(96, 64\)"),
        ("blk.0.attn_q.weight", np.full((64, 64), np.nan, np.float32), r"blk\.0\.attn_q\.weight.*NaN"),
        ("output_norm.weight", np.zeros(64, np.int32), r"output_norm\.weight.*I32.*Use a file of F32"),
        ("rope_freqs.weight", np.ones(7, np.float32), r"model\.gguf.*7 divisors"),
    ],
)
def test_a_wrong_tensor_is_named(tiny_model, tmp_path, name, tensor, message):
    model = tiny_model()
    tensors = {**gguf_tensors(model, "llama"), name: tensor}
    path = write_gguf(
        tmp_path / "model.gguf", model, {key: value for key, value in tensors.items() if value is not None}
    )
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_other_architectures_and_other_files_are_refused(tiny_model, tmp_path):
    model = tiny_model()
    path = write_gguf(tmp_path / "model.gguf", model, gguf_tensors(model, "falcon"), "falcon")
    with pytest.raises(CheckpointError, match=r"model\.gguf.*'falcon'.*expected.*llama"):
        load_model(path)
    path = write_gguf(tmp_path / "model.gguf", model, gguf_tensors(model, "llama"))
    path.write_bytes(path.read_bytes().replace(b"\0llama", b"\0llam\xff", 1))  # a value, not a key
    with pytest.raises(CheckpointError, match=r"model\.gguf: general\.architecture isn't text"):
        load_model(path)
    path.write_bytes(b"PK\x03\x04 an archive")
    with pytest.raises(CheckpointError, match="expected b'GGUF'"):
        load_model(path)
