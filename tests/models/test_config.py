"""Reading configs: what each format says, and what is refused."""

from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import CheckpointError
from models.llama_config import LlamaConfig
from models.rope import RopeScaling

HF = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GGUF = {
    "general.architecture": "llama",
    "llama.vocab_size": 1000,
    "llama.embedding_length": 128,
    "llama.feed_forward_length": 256,
    "llama.block_count": 2,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 4096,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def from_gguf(tensor_names=("output.weight",), rope_divisors=None, **changes):
    metadata = {**GGUF, **{key.replace("__", "."): value for key, value in changes.items()}}
    return LlamaConfig.from_gguf(metadata, tensor_names=tensor_names, rope_divisors=rope_divisors)


def as_qwen(kind):
    return {key.replace("llama.", f"{kind}."): value for key, value in GGUF.items()} | {"general.architecture": kind}


def test_what_config_json_leaves_out_takes_the_formats_default():
    config = LlamaConfig.from_hf(HF)
    assert (config.head_dim, config.rope_theta, config.rope_scaling) == (16, 10_000.0, None)
    assert (config.tie_embeddings, config.attention_bias, config.output_bias, config.qk_norm) == (False,) * 4
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)


def test_rope_is_read_from_both_generations_of_transformers():
    older = LlamaConfig.from_hf({**HF, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    newer = LlamaConfig.from_hf({**HF, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    oldest_key = LlamaConfig.from_hf({**HF, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert older == newer
    assert older.rope_theta == 5e5
    assert oldest_key.rope_scaling == RopeScaling.linear(head_dim=16, factor=4.0)


def test_llama3_scaling_keeps_fast_pairs_and_slows_the_slowest_by_the_factor():
    scaling = LlamaConfig.from_hf({**HF, "head_dim": 128, "rope_theta": 5e5, "rope_scaling": LLAMA3}).rope_scaling
    assert scaling is not None
    assert scaling.divisors[0] == 1.0
    assert scaling.divisors[-1] == pytest.approx(8.0)
    assert list(scaling.divisors) == sorted(scaling.divisors)
    assert any(1.0 < divisor < 8.0 for divisor in scaling.divisors)


@pytest.mark.parametrize(
    ("kind", "flags", "attention_bias", "output_bias", "qk_norm"),
    [
        ("llama", {"attention_bias": True}, True, True, False),
        ("mistral", {"attention_bias": True}, False, False, False),
        ("qwen2", {}, True, False, False),
        ("qwen3", {}, False, False, True),
        ("qwen3", {"attention_bias": True}, True, True, True),
    ],
)
def test_biases_and_norms_follow_the_model_type(kind, flags, attention_bias, output_bias, qk_norm):
    config = LlamaConfig.from_hf({**HF, "model_type": kind, **flags})
    assert (config.attention_bias, config.output_bias, config.qk_norm) == (attention_bias, output_bias, qk_norm)


@pytest.mark.parametrize(
    ("kind", "window", "context"),
    [
        ("mistral", {"sliding_window": 4096}, 4096),
        ("mistral", {"sliding_window": None}, 131072),
        ("mistral", {}, 4096),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}, 131072),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, 4096),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None}, 131072),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, 131072),
        ("qwen3", {"use_sliding_window": True}, 131072),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2, "max_window_layers": 0}, 131072),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, 4096),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, 131072),
        ("llama", {"sliding_window": 4096}, 131072),
    ],
)
def test_a_sliding_window_in_force_limits_the_context(kind, window, context):
    assert LlamaConfig.from_hf({**HF, "model_type": kind, **window}).max_context == context


KINDS = ["llama", "mistral", "qwen2", "qwen3"]
NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_context",
}


def same_as_transformers(kind, values):
    """Ours, compared with transformers' own class for that model type."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind, **{k: v for k, v in deepcopy(values).items() if k != "model_type"})
    ours = LlamaConfig.from_hf({**values, "model_type": kind})
    for key, name in NAMES.items():
        expected = getattr(theirs, key, None) or theirs.hidden_size // theirs.num_attention_heads
        if key == "max_position_embeddings" and kind == "mistral":
            expected = min(expected, theirs.sliding_window or expected)
        assert getattr(ours, name) == (False if key == "tie_word_embeddings" else expected), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", [*NAMES, "rope_theta", "sliding_window", "hidden_act", "attention_bias", "everything"])
def test_an_absent_key_means_what_transformers_takes_it_for(kind, key):
    whole = {**HF, "num_attention_heads": 32, "hidden_size": 512, "head_dim": 16, "rope_theta": 5e5}
    same_as_transformers(kind, {} if key == "everything" else {k: v for k, v in whole.items() if k != key})


@pytest.mark.parametrize("kind", KINDS)
def test_no_kv_heads_are_as_many_as_query_heads(kind):
    assert LlamaConfig.from_hf({**HF, "model_type": kind, "num_key_value_heads": None}).num_kv_heads == 8


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_biases_that_a_model_type_does_not_have_are_nothing(kind):
    assert LlamaConfig.from_hf({**HF, "model_type": kind, "mlp_bias": True}).intermediate_size == 256


SECTIONS = {
    "both, alike": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear"}},
    "an empty one": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {}, "rope_theta": 5e5},
    "a null one": {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta beside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    "theta twice": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 5e5},
    "original absent": {"rope_scaling": {k: v for k, v in LLAMA3.items() if k[0] != "o"}, "rope_theta": 5e5},
    "original beside": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k[0] != "o"},
        "original_max_position_embeddings": 4096,
    },
    "original beside, unused": {"rope_theta": 5e5, "original_max_position_embeddings": 4096},
}


@pytest.mark.parametrize("values", SECTIONS.values(), ids=SECTIONS.keys())
def test_all_that_is_said_of_rope_is_merged_as_transformers_does(values, torch):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours, theirs = same_as_transformers("llama", {**HF, **values})
    kind = theirs.rope_parameters["rope_type"]
    frequencies = ours.rope_theta ** -(np.arange(0, 16, 2) / 16)
    expected = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")[0].numpy() if kind != "default" else frequencies
    divisors = ours.rope_scaling.divisors if ours.rope_scaling else 1
    np.testing.assert_allclose(frequencies / divisors, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}}, "both 'yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_theta": 1e4}}, "'yarn' isn't"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}}, "both 'linear' and 'default'"),
        ({"rope_scaling": {"rope_theta": 1e4}, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta of RoPE is both"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta of RoPE is both"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0, "alpha": 8}},
            "'alpha' isn't known of RoPE",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention' isn't known"),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings of RoPE",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"factor": 4.0}}, "'factor' isn't known of RoPE of type 'default'"),
    ],
)
def test_rope_that_contradicts_itself_or_is_not_known_is_refused(values, message):
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_hf({**HF, **values})


def test_several_eos_tokens_are_kept():
    assert LlamaConfig.from_hf({**HF, "eos_token_id": [5, 6], "bos_token_id": 4}).eos_token_ids == (5, 6)
    assert from_gguf(tokenizer__ggml__eos_token_id=5, tokenizer__ggml__eot_token_id=6).eos_token_ids == (5, 6)
    assert from_gguf(tokenizer__ggml__eos_token_id=5, tokenizer__ggml__eot_token_id=5).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'.*expected.*llama"),
        ({"model_type": None}, "model_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*expected.*llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "positive"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"head_dim": 15}, "head_dim"),
        ({"head_dim": 2**33, "rope_scaling": {"type": "linear", "factor": 2.0}}, "head_dim"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*expected a finite number"),
        ({"rms_norm_eps": -(10**400)}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**400}, "num_layers"),
        ({"max_position_embeddings": 2**40}, "max_context"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"hidden_act": "gelu"}, "gelu.*expected 'silu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_parameters": [1]}, "rope_parameters"),
    ],
)
def test_hf_configs_that_are_not_a_llama_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_hf({**HF, **changes})


def test_gguf_architectures_and_what_their_tensors_say():
    assert from_gguf().head_dim == 16
    assert not from_gguf().tie_embeddings
    assert from_gguf(tensor_names=()).tie_embeddings
    assert from_gguf(tensor_names=("blk.0.attn_q.bias",)).attention_bias
    qwen2 = LlamaConfig.from_gguf(as_qwen("qwen2"), tensor_names=())
    qwen3 = LlamaConfig.from_gguf(as_qwen("qwen3"), tensor_names=())
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.attention_bias, qwen3.output_bias, qwen3.qk_norm) == (False, False, True)


def test_gguf_rope_scaling():
    linear = RopeScaling.linear(head_dim=16, factor=4.0)
    assert from_gguf(llama__rope__scaling__type="none").rope_scaling is None
    assert from_gguf(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0).rope_scaling == linear
    assert from_gguf(llama__rope__scale_linear=4.0).rope_scaling == linear
    assert from_gguf(llama__rope__scaling__factor=4.0).rope_scaling == linear
    assert from_gguf(llama__rope__scaling__factor=4.0, llama__rope__scale_linear=4.0).rope_scaling == linear
    assert from_gguf(llama__rope__scaling__factor=0.0).rope_scaling is None
    assert from_gguf(llama__rope__scaling__type="none", llama__rope__scaling__factor=1.0).rope_scaling is None
    assert from_gguf(llama__rope__scaling__original_context_length=4096).rope_scaling is None
    assert from_gguf(rope_divisors=[4.0] * 8).rope_scaling == linear
    assert from_gguf(llama__attention__sliding_window=1024).max_context == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "falcon"}, "'falcon'.*expected.*llama"),
        ({"llama__expert_count": 8}, "expert"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}, "'none' with the factors"),
        ({"llama__rope__scaling__factor": 4.0, "llama__rope__scale_linear": 2.0}, "with the factors"),
        ({"llama__rope__scaling__attn_factor": 1.2}, "attn_factor is 1.2"),
        ({"llama__rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier' isn't supported"),
        ({"llama__attention__key_length": 2**31, "llama__rope__scaling__factor": 2.0}, "head_dim"),
        ({"llama__rope__dimension_count": 8}, "dimension_count"),
        ({"llama__attention__head_count_kv": [2, 4]}, "head_count_kv"),
        ({"llama__block_count": None}, "block_count"),
        ({"rope_divisors": [1.0] * 7}, "divisors"),
        ({"rope_divisors": [0.0] * 8}, "positive"),
    ],
)
def test_gguf_metadata_that_is_not_a_llama_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        from_gguf(**changes)


@given(
    key=st.sampled_from(sorted(HF)),
    value=st.one_of(
        st.none(), st.integers(-9, 9), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
    ),
)
def test_one_odd_value_gives_a_config_or_a_checkpoint_error(key, value):
    try:
        config = LlamaConfig.from_hf({**HF, key: value})
    except CheckpointError:
        return
    assert config.num_heads % config.num_kv_heads == 0
