"""Hugging Face directories: transformers is the yardstick where it is installed; damage is named everywhere."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from models import CheckpointError, load_model
from models.checkpoints.assemble import parameters_of
from models.checkpoints.safetensors import load_safetensors

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 32}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-window": ("Mistral", {"sliding_window": 96}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3", {"head_dim": 16}),
}


def transformers_model(variant, torch):
    """A random model whose every parameter, biases and norms too, matters."""
    transformers = pytest.importorskip("transformers")
    family, changes = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(variant, tmp_path, tokens, forward, torch):
    theirs = transformers_model(variant, torch)
    shards = {"max_shard_size": "50KB"} if variant in ("llama", "qwen3") else {}
    theirs.save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)

    prompts = torch.tensor(tokens).long()
    with torch.no_grad():
        generated = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=64, pad_token_id=0
        )
        expected = theirs(generated).logits.numpy()
    ours = forward(load_model(tmp_path), generated.numpy())
    assert np.abs(ours - expected).max() <= 1e-4
    # Given the tokens before it, each generated token is our argmax too; so, by induction, greedy runs are identical.
    np.testing.assert_array_equal(ours[:, 31:-1].argmax(-1), generated[:, 32:])


def test_bfloat16_weights_are_read_exactly(hf_directory, tokens, forward):
    tensors = {
        name: value.astype(jnp.bfloat16) for name, value in load_file(hf_directory / "model.safetensors").items()
    }
    save_file(tensors, hf_directory / "model.safetensors")
    kernel = load_model(hf_directory).layers[1].feed_forward.up.kernel[...]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel.T, tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float32))


def test_dtype_is_that_of_every_parameter(hf_directory):
    model = load_model(hf_directory, dtype=jnp.bfloat16)
    assert {leaf[...].dtype for leaf in parameters_of(model).values()} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="floating"):
        load_model(hf_directory, dtype=jnp.int8)


def test_loading_gives_back_the_model_that_was_written(hf_directory, tiny_model, tokens, forward):
    np.testing.assert_array_equal(forward(load_model(hf_directory), tokens), forward(tiny_model(), tokens))


def test_eos_tokens_come_from_generation_config_too(hf_directory):
    (hf_directory / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert load_model(hf_directory).config.eos_token_ids == (2, 7)


def test_tensors_known_to_be_harmless_are_ignored(hf_directory):
    change_tensors(hf_directory, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    load_model(hf_directory)
    change_config(hf_directory, tie_word_embeddings=True)
    assert load_model(hf_directory).head is None


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(directory, changes):
    """Replace tensors, or remove those whose new value is None."""
    tensors = {**load_file(directory / "model.safetensors"), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / "model.safetensors")


def with_value(shape, value):
    tensor = np.zeros(shape, np.float32)
    tensor.flat[3] = value
    return tensor


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "lacks 1 of .*model.layers.1.mlp.up_proj.weight"),
        ("lm_head.weight", None, "lacks 1 of .*lm_head.weight"),
        ("model.layers.0.self_attn.q_proj.bias", with_value(64, 0), "doesn't use.*q_proj.bias"),
        ("model.layers.2.input_layernorm.weight", with_value(64, 0), "doesn't use.*model.layers.2"),
        ("model.norm.weight", with_value(63, 0), r"model.norm.weight.*\(63,\), expected \(64,\)"),
        ("model.layers.0.mlp.up_proj.weight", with_value((64, 96), 0), r"up_proj.*\(64, 96\), expected \(96, 64\)"),
        ("model.layers.0.mlp.up_proj.weight", with_value((96, 64), np.nan), "up_proj.weight.*NaN"),
        ("model.embed_tokens.weight", with_value((160, 64), -np.inf), "embed_tokens.weight.*infinite"),
        ("model.norm.weight", np.zeros(64, np.int8), "model.norm.weight.*int8, expected floats"),
    ],
)
def test_a_wrong_tensor_is_named(hf_directory, name, tensor, message):
    change_tensors(hf_directory, {name: tensor})
    with pytest.raises(CheckpointError, match=message):
        load_model(hf_directory)


def test_values_too_large_for_the_dtype_are_refused(hf_directory):
    change_tensors(hf_directory, {"model.norm.weight": with_value(64, 1e6)})
    load_model(hf_directory)
    with pytest.raises(CheckpointError, match=r"model.norm.weight.*float16"), np.errstate(over="ignore"):
        load_model(hf_directory, dtype=jnp.float16)


@settings(max_examples=25, deadline=None)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named(tmp_path_factory, kept):
    directory = tmp_path_factory.mktemp("truncated")
    save_file({"model.norm.weight": np.ones(64, np.float32)}, directory / "model.safetensors")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: int(kept * len(whole))])
    (directory / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama", "rms_norm_eps": 1e-5}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*cut short"):
        load_safetensors(directory)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", struct.pack("<Q", 2**60), b"\x02" + b"\0" * 7 + b"{]"])
def test_what_is_not_safetensors_is_named(hf_directory, content):
    (hf_directory / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*not safetensors"):
        load_model(hf_directory)


def test_damaged_shards_are_named(hf_directory):
    weights = hf_directory / "model.safetensors"
    shard, index = hf_directory / "model-00001-of-00001.safetensors", hf_directory / "model.safetensors.index.json"
    weight_map = dict.fromkeys(load_file(weights), shard.name)
    weights.rename(shard)
    index.write_text(json.dumps({"weight_map": weight_map}))
    load_model(hf_directory)

    index.write_text(json.dumps({"weight_map": {**weight_map, "model.more": shard.name}}))
    with pytest.raises(CheckpointError, match=r"lack 'model.more'"):
        load_model(hf_directory)
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"elsewhere.*beside"):
        load_model(hf_directory)
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.norm.weight": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        load_model(hf_directory)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json isn't JSON"):
        load_model(hf_directory)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(hf_directory)
    index.unlink()
    shard.rename(hf_directory / "a.safetensors")
    (hf_directory / "b.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files, expected one"):
        load_model(hf_directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "isn't JSON"),
        ("\udcff", "isn't JSON"),
        ("[1]", "holds a list"),
        ('{"model_type": "gpt2"}', r"config\.json.*'gpt2'.*expected.*llama"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(hf_directory, content, message):
    (hf_directory / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=message):
        load_model(hf_directory)


def test_paths_that_hold_no_model_are_named(hf_directory, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere doesn't exist"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no weights.*config\.json and \*\.safetensors"):
        load_model(tmp_path / "empty")
    (hf_directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"can't read .*config\.json"):
        load_model(hf_directory)
    (hf_directory / "model.safetensors").unlink()
    for name in ("a.gguf", "b.gguf"):
        (hf_directory / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files \(a\.gguf, b\.gguf\)"):
        load_model(hf_directory)
