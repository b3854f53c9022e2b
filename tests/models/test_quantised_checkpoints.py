"""Hugging Face checkpoints with quantised weights: each format gives what its formula gives; damage is named."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from models import CheckpointError, load_model, stack_layers
from models.checkpoints.assemble import parameters_of
from models.checkpoints.orbax import save
from models.quantised import Packed, Quantised, Scaled
from tests.models.quantised_formats import BF16, BLOCKS, F8, FORMATS, FP8, compressed, write_safetensors

FOUR_BITS = {
    name
    for name in FORMATS
    if name.split(",")[0] in ("pack-quantized", "gptq", "gptq_v2", "awq") and "8 bits" not in name
}


def rewrite(directory, tensors, **config):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    write_safetensors(directory / "model.safetensors", tensors)


@pytest.fixture
def written(hf_directory):
    """Rewrites the tiny Llama in a format; returns the file's tensors, and them with floats for codes."""

    def write(form, *, layers=lambda name: "_proj.weight" in name):
        rng, plain = np.random.default_rng(0), load_file(hf_directory / "model.safetensors")
        tensors, floats = {}, {}
        for name, tensor in plain.items():
            module = name.removesuffix(".weight")
            if not layers(name):
                tensors[name] = floats[name] = tensor
                continue
            parts = form.write(tensor, rng)
            tensors |= {f"{module}.{part}": np.array(value) for part, value in parts.items()}
            floats[name] = form.read(parts).astype(np.float32)
            assert np.abs(floats[name] - tensor).max() < 0.1 * np.abs(tensor).max()
        rewrite(hf_directory, tensors, **{form.key: form.config})
        return tensors, floats

    return write


def quantised_in(model):
    return {path: v for path, leaf in parameters_of(model).items() if isinstance(v := leaf.get_value(), Quantised)}


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_formula(name, written, hf_directory, tokens, forward):
    _, floats = written(FORMATS[name])
    stored, widened = load_model(hf_directory, weights="stored"), load_model(hf_directory)
    assert len(quantised_in(stored)) == 14
    assert not quantised_in(widened)
    held = sum(leaf.nbytes for value in quantised_in(stored).values() for leaf in jax.tree.leaves(value.codes))
    count = sum(floats[name].size for name in floats if "_proj.weight" in name)
    assert held == count * (1 / 2 if name in FOUR_BITS else 1)
    path = hf_directory / "config.json"
    config = json.loads(path.read_text())
    config.pop(FORMATS[name].key)
    path.write_text(json.dumps(config))
    write_safetensors(hf_directory / "model.safetensors", floats)
    expected = forward(load_model(hf_directory), tokens)
    for model in (stored, widened, stack_layers(stored)):
        assert np.abs(forward(model, tokens) - expected).max() <= 1e-5


@pytest.mark.parametrize("name", ["float-quantized, channel [out,1]", "fp8, blocks", "int-quantized"])
def test_embeddings_and_head_may_be_quantised(name, written, hf_directory, tokens, forward):
    form = FORMATS[name]
    if name != "fp8, blocks":
        groups = form.config["config_groups"]
        groups["group_0"] = groups["group_0"] | {"targets": ["re:.*"]}
        form = replace(form, config=form.config | {"ignore": [], "config_groups": groups})
    _, floats = written(form, layers=lambda name: "norm" not in name)
    stored = load_model(hf_directory, weights="stored")
    assert len(quantised_in(stored)) == 16
    path = hf_directory / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != form.key}))
    write_safetensors(hf_directory / "model.safetensors", floats)
    expected = forward(load_model(hf_directory), tokens)
    assert np.abs(forward(stored, tokens) - expected).max() <= 1e-5


def test_what_the_file_holds_decides(written, hf_directory):
    """Layers that the config lists may be stored as floats, whole layers among others that aren't."""
    form = FORMATS["float-quantized, tensor [1]"]
    written(form, layers=lambda name: "layers.1.mlp" in name)
    found = quantised_in(load_model(hf_directory, weights="stored"))
    assert {path[1:4] for path in found} == {("1", "feed_forward", name) for name in ("gate", "up", "down")}
    assert {type(value) for value in found.values()} == {Scaled}


def test_a_stored_checkpoint_is_saved_and_restored(written, hf_directory, tmp_path, tokens, forward):
    written(FORMATS["pack-quantized, zeros and order"])
    stored = load_model(hf_directory, weights="stored")
    save(stored, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", weights="stored")
    assert all(isinstance(value.codes, Packed) for value in quantised_in(loaded).values())
    np.testing.assert_array_equal(forward(loaded, tokens), forward(stored, tokens))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_checkpoints_are_quantised_otherwise(kind, written, hf_directory):
    written(FORMATS["awq"])
    found = quantised_in(load_model(hf_directory, weights=kind))
    assert len(found) == (14 if kind == "fp8" else 16)  # FP8 is for layers alone
    assert {type(value) for value in found.values()} == {Scaled}


def test_scales_for_kvs_are_left_with_a_note(written, hf_directory, tokens, forward):
    tensors, _ = written(FORMATS["fp8, tensor"])
    before = forward(load_model(hf_directory, weights="stored"), tokens)
    more = {f"model.layers.{n}.self_attn.{kv}_scale": np.ones(1, BF16) for n in (0, 1) for kv in "kv"}
    rewrite(hf_directory, tensors | more)
    with pytest.warns(UserWarning, match="4 scales for keys and values"):
        model = load_model(hf_directory, weights="stored")
    np.testing.assert_array_equal(forward(model, tokens), before)


UP = "model.layers.0.mlp.up_proj"
"""``[96, 64]``."""


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fp8, tensor", {"weight_scale": None}, "without a scale"),
        ("fp8, blocks", {"weight_scale_inv": None}, "without a scale"),
        ("fp8, tensor", {"weight_scale": np.full((), np.nan, np.float32)}, "NaN or infinite values among its scales"),
        ("fp8, tensor", {"weight": np.full((96, 64), np.nan, F8)}, "NaN or infinite values among its codes"),
        ("fp8, tensor", {"weight_scale": np.ones(3, np.float32)}, r"scales of shape \(3,\), expected"),
        ("fp8, tensor", {"weight_scale": np.ones((), np.int32)}, "weight_scale of int32, expected floats"),
        ("fp8, tensor", {"weight_scale_inv": np.ones((), np.float32)}, "expected one scale"),
        ("fp8, tensor", {"weight": np.ones((96, 64), np.float32)}, "holds float32 beside weight, weight_scale"),
        ("fp8, tensor", {"weight": np.ones((96, 64), np.int8)}, "holds int8, of which the config doesn't say"),
        ("fp8, tensor", {"weight": np.ones((96, 63), F8)}, r"\(96, 63\), expected \(96, 64\)"),
        ("fp8, blocks", {"weight_scale_inv": np.ones((2, 3), np.float32)}, r"scales of shape \(2, 3\)"),
        (
            "float-quantized, channel [out]",
            {"weight_scale": np.ones(1, BF16)},
            r"scales of shape \(1,\), expected \[96\]",
        ),
        ("float-quantized, tensor [1]", {"weight_scale": np.ones((96, 1), BF16)}, r"scales of shape \(96, 1\)"),
        ("int-quantized", {"weight": np.ones((96, 64), F8)}, "holds float8_e4m3fn, where the config says int"),
        ("int-quantized", {"weight_scale": None}, "int8, expected floats"),
        ("int-quantized, asymmetric", {"weight_zero_point": None}, "asymmetric by its config"),
        ("pack-quantized", {"weight_shape": None}, "no weight_shape"),
        ("pack-quantized", {"weight_shape": np.array([96, 72])}, r"\(96, 72\), expected \(96, 64\)"),
        ("pack-quantized", {"weight_scale": None}, "no weight_scale"),
        ("pack-quantized", {"weight_packed": np.ones((96, 9), np.int32)}, "expected 32-bit words"),
        ("pack-quantized", {"weight_packed": np.ones((96, 8), np.float32)}, "expected 32-bit words"),
        ("pack-quantized, zeros", {"weight_zero_point": None}, "asymmetric by its config"),
        ("pack-quantized, zeros", {"weight_zero_point": np.ones((11, 2), np.int32)}, "weight_zero_point of int32"),
        ("pack-quantized, order", {"weight_g_idx": np.zeros(64, np.int32)}, "groups aren't of 32"),
        ("pack-quantized, order", {"weight_g_idx": np.zeros(63, np.int32)}, "expected 64 whole numbers"),
        ("gptq", {"scales": None}, "no scales"),
        ("gptq", {"qzeros": None}, "no qzeros"),
        ("gptq", {"scales": np.ones((3, 96), np.float16)}, r"scales of shape \(3, 96\), expected \(2, 96\)"),
        ("gptq", {"qzeros": np.ones((2, 11), np.int32)}, "expected 32-bit words"),
        ("gptq", {"g_idx": np.arange(64, dtype=np.int32)}, "groups aren't of 32"),
        ("gptq", {"bias": np.ones(96, np.float16)}, "tensors that a model of its config doesn't use"),
        ("gptq", {"weight": np.ones((96, 64), np.float32)}, "has both"),
        ("awq", {"qweight": np.ones((64, 11), np.int32)}, r"expected \(96, 64\)"),
        ("awq", {"qweight": np.ones(64, np.int32)}, "expected a matrix"),
    ],
)
def test_layers_whose_tensors_do_not_belong_together_are_named(name, changes, message, written, hf_directory):
    tensors, _ = written(FORMATS[name])
    tensors |= {f"{UP}.{part}": value for part, value in changes.items()}
    rewrite(hf_directory, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    for weights in ("stored", "floats"):
        with pytest.raises(CheckpointError, match=rf"(?s){UP}.*{message}|{message}.*{UP}"):
            load_model(hf_directory, weights=weights)


@pytest.mark.parametrize("name", ["pack-quantized", "gptq", "awq", "int-quantized"])
def test_integers_without_a_scheme_are_refused(name, written, hf_directory):
    written(FORMATS[name])
    path = hf_directory / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"proj.*the config doesn't say what"):
        load_model(hf_directory)


def two_groups(**others):
    config = compressed("float-quantized", "tensor")
    config["config_groups"] |= {
        "group_1": compressed("float-quantized", "channel", **others)["config_groups"]["group_0"]
    }
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4', expected one of compressed-tensors"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({}, "no 'quant_method'"),
        ({"quant_method": 3}, "expected a string"),
        (compressed("nvfp4-pack-quantized", "tensor"), "format is 'nvfp4-pack-quantized'"),
        (compressed("float-quantized", "tensor") | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        (
            compressed("float-quantized", "tensor") | {"transform_config": {"config_groups": {"u": {}}}},
            "transform_config isn't supported",
        ),
        (compressed("float-quantized", "tensor", bits=4), "4-bit 'float'"),
        (compressed("float-quantized", "tensor_group"), "'tensor_group'"),
        (compressed("float-quantized", "block"), "one contradicts"),
        (compressed("float-quantized", "block", block_structure=[0, 128]), "two positive numbers"),
        (compressed("pack-quantized", "group", kind="int", bits=4, group_size=0), "group_size is 0"),
        (compressed("float-quantized", "tensor", target="re:("), "no regular expression"),
        (compressed("float-quantized", "tensor", target="re:(a+)+$"), "too complex"),
        (compressed("float-quantized", "tensor", target="re:" + ".*" * 9), "too complex"),
        (two_groups(), "several config_groups name 'model.layers"),
        (two_groups(target="re:.*proj") | {"format": "mixed-precision"}, r"scales of shape \(1,\)"),
        (BLOCKS | {"weight_block_size": [128]}, "two positive numbers"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'NVFP4'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits is 3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "format": "marlin"}, "'marlin'"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "bits is 8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "awq", "bits": 4, "group_size": -2}, "group_size is -2"),
    ],
)
def test_a_config_of_another_quantisation_is_named(config, message, written, hf_directory):
    written(FORMATS["float-quantized, tensor [1]"])
    path = hf_directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=message):
        load_model(hf_directory)
