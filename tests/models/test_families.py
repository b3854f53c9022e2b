"""A family added as a file and a line, and the places in which a checkpoint may have a parameter."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import CheckpointError, Decoder, families, load_model
from models.checkpoints import orbax
from models.checkpoints.assemble import assemble, parameters_of
from models.family import Family, NameMap, Rows, Stacked, Whole
from models.fields import Fields
from models.llama import FAMILY, GGUF_NAMES, HF_NAMES, Llama
from tests.models.granite import TINY_GRANITE, Granite, GraniteConfig


def granite_config(values) -> GraniteConfig:
    fields = Fields(origin="config.json", values=values)
    return GraniteConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("hidden_size") // fields.integer("num_attention_heads"),
        max_context=fields.integer("max_position_embeddings"),
        embedding_multiplier=fields.number("embedding_multiplier"),
        residual_multiplier=fields.number("residual_multiplier"),
        attention_multiplier=fields.number("attention_multiplier"),
        logits_divisor=fields.number("logits_scaling"),
        rms_norm_eps=fields.number("rms_norm_eps"),
    )


GRANITE = Family(
    config_file="granite.json",
    config=GraniteConfig,
    build=Granite,
    hf_types=("granite",),
    config_from_hf=granite_config,
    config_from_gguf=granite_config,
    config_from_saved=lambda fields: GraniteConfig(**{**fields.values, "eos_token_ids": (), "specs": ()}),
    hf_names=NameMap(
        model=HF_NAMES.model,
        layer_prefix=HF_NAMES.layer_prefix,
        layer={path.removeprefix("attention."): name for path, name in HF_NAMES.layer.items()},
    ),
    gguf_names=GGUF_NAMES,
)


@pytest.fixture
def with_granite(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, GRANITE))


@pytest.mark.usefixtures("with_granite")
def test_a_ported_model_gives_the_logits_of_transformers(tmp_path, tokens, forward, torch):
    transformers = pytest.importorskip("transformers")
    config = transformers.GraniteConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.1,
        logits_scaling=8.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    theirs = transformers.GraniteForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours, Granite)
    assert isinstance(ours, Decoder)
    assert np.abs(expected).max() > 0.1
    assert np.abs(forward(ours, tokens) - expected).max() <= 1e-4


@pytest.mark.usefixtures("with_granite")
def test_a_ported_model_is_saved_under_its_own_name(tmp_path, tokens, forward):
    model = Granite(TINY_GRANITE, rngs=nnx.Rngs(0))
    orbax.save(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "granite.json").exists()
    loaded = load_model(tmp_path / "saved")
    assert loaded.config == TINY_GRANITE
    np.testing.assert_array_equal(forward(loaded, tokens), forward(model, tokens))


def test_a_model_of_no_family_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"GraniteConfig, expected one of LlamaConfig.*models/families\.py"):
        orbax.save(Granite(TINY_GRANITE, rngs=nnx.Rngs(0)), tmp_path / "saved")


@pytest.mark.usefixtures("with_granite")
def test_an_unknown_type_is_told_all_that_are_known():
    with pytest.raises(CheckpointError, match="'gpt2', expected one of llama, mistral, qwen2, qwen3, granite"):
        families.family_of_hf({"model_type": "gpt2"})
    with pytest.raises(
        CheckpointError, match=r"general\.architecture is 'falcon', expected one of llama, qwen2, qwen3"
    ):
        families.family_of_gguf({"general.architecture": "falcon"})


class Tensors(dict):
    """A ``TensorSource`` in memory."""

    origin = Path("memory")

    def names(self):
        return self.keys()

    def shape(self, name):
        return self[name].shape

    def nbytes(self, name):
        return self[name].nbytes

    def read(self, name, *, stored):
        return self[name]


def stored_tensors(model: Llama) -> Tensors:
    """The model's parameters as ``HF_NAMES`` has them, ``[out, in]``."""
    tensors = Tensors()
    for path, leaf in parameters_of(model).items():
        value = np.asarray(leaf[...])
        tensors[HF_NAMES(path, model.config).name] = value.T if path[-1] == "kernel" else value
    return tensors


def assembled(model: Llama, tensors: Tensors, names) -> Llama:
    return assemble(FAMILY, model.config, tensors, names=names, harmless=lambda name: False, dtype=jnp.float32)


def fused_names(path, config):
    """As Phi-3 stores them: the query's rows, then the key's, then the value's, in one tensor."""
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends = {"query": (0, wide), "key": (wide, wide + narrow), "value": (wide + narrow, wide + 2 * narrow)}
    if len(path) > 3 and path[3] in ends:
        return Rows(f"fused.{path[1]}.{path[-1]}", *ends[path[3]])
    return HF_NAMES(path, config)


def fused(model: Llama) -> Tensors:
    tensors = stored_tensors(model)
    for layer in range(model.config.num_layers):
        for leaf, ours in (("weight", "kernel"), ("bias", "bias")):
            parts = [tensors.pop(f"model.layers.{layer}.self_attn.{name}_proj.{leaf}") for name in "qkv"]
            tensors[f"fused.{layer}.{ours}"] = np.concatenate(parts)
    return tensors


def assert_same(found: Llama, expected: Llama):
    leaves = parameters_of(found)
    for path, leaf in parameters_of(expected).items():
        np.testing.assert_array_equal(leaves[path][...], leaf[...])


def test_parameters_may_be_rows_of_one_tensor(tiny_model):
    model = tiny_model(attention_bias=True)
    assert_same(assembled(model, fused(model), fused_names), model)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: np.concatenate([x, x])])
def test_a_tensor_of_other_rows_than_its_parts_is_named(tiny_model, change):
    model = tiny_model(attention_bias=True)
    tensors = fused(model)
    tensors["fused.1.kernel"] = change(tensors["fused.1.kernel"])
    with pytest.raises(CheckpointError, match=r"fused\.1\.kernel.*expected \(128, 64\)"):
        assembled(model, tensors, fused_names)


def test_a_parameter_may_be_several_tensors_stacked():
    """The smallest model with such a parameter: a kernel of three experts."""

    class Experts(nnx.Module):
        def __init__(self, config, *, rngs, dtype):
            self.config = config
            self.layers = nnx.List([nnx.Linear(1, 1, rngs=rngs) for _ in range(config.num_layers)])
            self.kernel = nnx.Param(jnp.zeros((3, 2, 4), dtype))

    def names(path, config):
        return Stacked(tuple(f"expert.{i}" for i in range(3))) if path == ("kernel",) else Whole(".".join(path))

    experts = {f"expert.{i}": np.full((4, 2), i, np.float32) + np.arange(2, dtype=np.float32) for i in range(3)}
    layer = {"layers.0.kernel": np.ones((1, 1), np.float32), "layers.0.bias": np.ones(1, np.float32)}
    family = replace(FAMILY, build=Experts)
    config = replace(TINY_GRANITE, num_layers=1)

    def load(tensors):
        return assemble(family, config, tensors, names=names, harmless=lambda name: False, dtype=jnp.float32)

    kernel = load(Tensors({**experts, **layer})).kernel[...]
    for i in range(3):
        np.testing.assert_array_equal(kernel[i], experts[f"expert.{i}"].T)
    with pytest.raises(CheckpointError, match=r"lacks 1 .*expert\.2"):
        load(Tensors({**{name: value for name, value in experts.items() if name != "expert.2"}, **layer}))
    with pytest.raises(CheckpointError, match=r"expert\.1.*\(4, 3\), expected \(4, 2\)"):
        load(Tensors({**experts, "expert.1": np.zeros((4, 3), np.float32), **layer}))


def test_names_that_do_not_fit_the_model_are_the_familys_fault(tiny_model):
    model = tiny_model()

    def short(path, config):
        return Rows("model.norm.weight", 0, 63) if path[0] == "norm" else HF_NAMES(path, config)

    tensors = stored_tensors(model)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:63]
    with pytest.raises(ValueError, match=r"'norm'.*\(64,\), but \(63,\)"):
        assembled(model, tensors, short)
