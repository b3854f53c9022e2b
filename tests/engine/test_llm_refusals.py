"""What an LLM is asked and how it is set up: what can't be is refused by name, before any work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from jaxkv import LLM, KVCompress, MaxBytes, MaxTokens, Ratio, SamplingParams
from jaxkv.requests import Finished, Refused
from models.checkpoints.orbax import save

pytestmark = pytest.mark.once


BLOCK_BYTES = 16 * (2 * 16 * 4 + 8)
PROMPT = tiny.prompt(70, 1).tolist()


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.MODEL)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([[]], None, "^the prompt is empty"),
        ([tiny.prompt(512).tolist()], None, "^the prompt has 512 tokens, but the model's context is 512"),
        ([[1, 2], [3, 101]], None, r"prompt 1: the prompt has token ids outside 0\.\.100"),
        ([[1, -1]], None, r"outside 0\.\.100"),
        ([[2**40]], None, r"outside 0\.\.100"),
        ([[1.7, 2.2]], None, "whole numbers, got float64"),
        ([[True]], None, "whole numbers, got bool"),
        ([[[1, 2]]], None, "must be a text or a list of token ids"),
        (["text"], None, "no tokenizer"),
        ([[1]], [SamplingParams(), SamplingParams()], "1 prompts, 2 params"),
        ([[1]], SamplingParams(stop=("x",)), "stop texts need a tokenizer"),
    ],
)
def test_bad_prompts_are_refused(llm, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, params)


def test_a_prompt_longer_than_the_pool_says_how_much_it_needs():
    tight = LLM(tiny.MODEL, cache_memory=60_000, compression=KVCompress(budget=Ratio(ratio=8)))
    with pytest.raises(ValueError, match=r"needs 32 blocks while it is read .* cache_memory of at least") as error:
        tight.generate(tiny.prompt(400).tolist(), SamplingParams(max_tokens=4))
    enough = int(str(error.value).split("at least ")[1].split()[0])
    roomy = LLM(tiny.MODEL, cache_memory=enough, compression=KVCompress(budget=Ratio(ratio=8)))
    assert roomy.generate(tiny.prompt(400).tolist(), SamplingParams(max_tokens=4))


def test_an_answer_that_may_not_fit_is_refused_before_it_begins():
    """Rather than running dry half-way."""
    full = LLM(tiny.MODEL, cache_memory=60_000)
    with pytest.raises(ValueError, match="needs 112 blocks with its answer"):
        full.generate(tiny.prompt(200).tolist(), SamplingParams(max_tokens=240))
    policy = KVCompress(budget=MaxTokens(tokens=64), protected_window=8)
    small = LLM(tiny.MODEL, cache_memory=140_000, compression=policy)
    with pytest.raises(ValueError, match="240 more tokens may need 60; give cache_memory of at least") as error:
        small.generate(tiny.prompt(200).tolist(), SamplingParams(max_tokens=240, ignore_eos=True))
    enough = int(str(error.value).split("at least ")[1].split()[0])
    roomy = LLM(tiny.MODEL, cache_memory=enough, compression=policy)
    [answer] = roomy.generate(tiny.prompt(200).tolist(), SamplingParams(max_tokens=240, ignore_eos=True))
    assert len(answer.token_ids) == 240


def test_calls_of_like_sizes_share_their_programs():
    llm = LLM(tiny.MODEL)
    llm.generate(tiny.prompt(200).tolist(), SamplingParams(max_tokens=4))
    [again] = llm.generate(tiny.prompt(130).tolist(), SamplingParams(max_tokens=90, ignore_eos=True))
    compiled = again.timings.compile
    [third] = llm.generate(tiny.prompt(131).tolist(), SamplingParams(max_tokens=80, ignore_eos=True))
    assert third.timings.compile == 0 <= compiled


@pytest.mark.parametrize(
    ("budget", "window", "message"),
    [
        (MaxTokens(tokens=31), 32, "max_cache_tokens=31 leaves 31 tokens .* protected window of 32; give more tokens"),
        (MaxTokens(tokens=15), 8, "max_cache_tokens=15 leaves 15 tokens .* at least one block of 16"),
        (MaxBytes(size=3000), 32, "max_cache_bytes=3000 leaves 4 tokens .* give more bytes"),
        (MaxBytes(size=4 * BLOCK_BYTES - 1), 8, "leaves 12 tokens a head, .* at least one block of 16"),
    ],
)
def test_an_impossible_budget_is_refused_before_any_work(budget, window, message):
    llm = LLM(tiny.MODEL, compression=KVCompress(budget=budget, protected_window=window))
    with pytest.raises(ValueError, match=message):
        next(llm.events([PROMPT]))


@pytest.mark.parametrize("ratio", [0.99, 0.0, -2.0, float("nan")])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio must be at least 1"):
        Ratio(ratio=ratio)


def test_a_batch_of_none_is_refused():
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        LLM(tiny.MODEL, max_batch=0)


@pytest.mark.parametrize(
    "kind", [np.array, jnp.array, tuple, lambda ids: list(np.array(ids)), lambda ids: [*jnp.array(ids)]]
)
def test_token_ids_of_any_kind_are_one_prompt_or_several(llm, kind):
    ids, params = PROMPT[:16], SamplingParams(max_tokens=np.int64(4), seed=np.uint8(3), temperature=np.float32(0))
    [want] = llm.generate(ids, SamplingParams(max_tokens=4))
    assert [a.token_ids for a in llm.generate(kind(ids), params)] == [want.token_ids]
    assert [a.token_ids for a in llm.generate([kind(ids), kind(ids)], params)] == [want.token_ids] * 2
    if kind in (np.array, jnp.array):
        assert [a.token_ids for a in llm.generate(kind([ids, ids]), params)] == [want.token_ids] * 2


def test_a_job_without_params_is_refused_and_the_others_go_on(llm):
    events = list(llm.run([([1], {"max_tokens": 3}), (None, SamplingParams()), ([1], SamplingParams(max_tokens=2))]))
    assert [e.request for e in events if isinstance(e, Refused)] == [0, 1]
    assert [e.request for e in events if isinstance(e, Finished)] == [2]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (5, None, "prompts must be a text, a list of token ids, or a list of either, got 5"),
        (None, None, "prompts must be a text"),
        ({1: 2}, None, "prompts must be a text"),
        (np.array(3), None, "a prompt must be a text or a list of token ids"),
        (np.array([], int), None, "the prompt is empty"),
        (jnp.array([1.5]), None, "token ids must be whole numbers, got float32"),
        ([[1, [2]]], None, "a prompt must be a text or a list of token ids"),
        ([None], None, "a prompt must be a text or a list of token ids, got"),
        ([1], {"max_tokens": 3}, r"params must be SamplingParams, .*, got \{'max_tokens': 3\}"),
        ([1], [None], "params must be SamplingParams, .*, got None"),
    ],
)
def test_what_is_no_prompt_or_no_params_is_refused(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "^dtype must be float32 or bfloat16, got 'int8'"),
        ({"dtype": "no such"}, "^dtype must be float32 or bfloat16, got 'no such'"),
        ({"cache_dtype": "int8"}, "cache_dtype must be float32 or bfloat16, got 'int8'"),
        ({"cache_dtype": jnp.float64}, "cache_dtype must be float32 or bfloat16, got .*float64"),
        ({"cache_dtype": np.uint16}, "cache_dtype must be float32 or bfloat16"),
        ({"max_batch": 2.5}, "max_batch must be a whole number, got 2.5"),
        ({"cache_memory": 5e8}, "cache_memory must be a whole number, got 500000000.0"),
        ({"block_size": "16"}, "block_size must be a whole number, got '16'"),
        (
            {"compression": 8},
            'must be a policy, its name, or None .* got 8; write compression="auto", ratio=8',
        ),
        ({"compression": "snapkv"}, "policy snapkv needs a budget: .* such as ratio=8"),
        ({"compression": "snapvk", "ratio": 8}, "no policy is named 'snapvk'"),
        ({"compression": KVCompress(ratio=8), "ratio": 4}, "KVCompress has a budget, .* leave ratio out"),
        ({"ratio": 8, "max_cache_tokens": 64}, "give one of ratio, max_cache_tokens, max_cache_bytes, got 2"),
        ({"cache_memory": "lots"}, "'lots' is no number of bytes; write 500M"),
    ],
)
def test_settings_of_another_type_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LLM(tiny.MODEL, **settings)


@pytest.mark.parametrize(("given", "kept"), [(None, ()), ("x", ("x",)), (["x", "y"], ("x", "y")), ([], ())])
def test_stop_texts_may_be_none_one_or_several(given, kept):
    assert hash(SamplingParams(stop=given)) == hash(SamplingParams(stop=kept))
    assert SamplingParams(stop=given).stop == kept


def test_numbers_of_numpy_become_pythons_own():
    params = SamplingParams(max_tokens=np.int32(5), top_p=np.float64(0.5), logprobs=np.bool_(True))
    assert [type(x) for x in (params.max_tokens, params.top_p, params.logprobs)] == [int, float, bool]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 3.0}, "max_tokens must be a whole number, got 3.0"),
        ({"max_tokens": None}, "max_tokens must be a whole number, got None"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"seed": 10**5000}, "seed must be in .*, got a number of 16610 bits"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"logprobs": 5}, "logprobs must be true or false, got 5; write top_logprobs=5"),
        ({"stop": 5}, "stop must be texts, none of them empty, got 5"),
        ({"stop": b"x"}, "stop must be texts"),
        ({"compression": "snapkv"}, "policy snapkv needs a budget"),
        ({"compression": 8}, "compression must be a policy"),
        ({"top_logprobs": 21}, "top_logprobs must be between 0 and 20, got 21"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be in \(0, 1e6\], got 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be between"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be a mapping of token ids to numbers, such as {50: -100}, got"),
        ({"logit_bias": 5}, "logit_bias must be a mapping"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be between 0 and max_tokens, 4, got 5"),
        ({"stop_token_ids": ("x",)}, "stop_token_ids must be token ids, got"),
        ({"n": 0}, "n must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_sampling_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int4"}, "weights must be one of stored, float32, bfloat16, int8, fp8, got 'int4'"),
        ({"weights": "bfloat16", "dtype": "float32"}, "computed with in their own dtype, got dtype 'float32'"),
        ({"weights": "int8"}, "for a model that is yet to be loaded"),
    ],
)
def test_weights_that_can_not_be_had_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LLM(tiny.MODEL, **settings)


def test_weights_are_held_as_they_are_asked_for(tmp_path):
    save(tiny.random_model(), tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text(Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="b")).to_str())

    def loaded(**settings):
        model = LLM(tmp_path / "saved", **settings)
        kernel = model.model.layers[0].attention.query.kernel.get_value()
        return model, jax.tree.leaves(kernel)[0].dtype

    for weights, dtype in (("int8", jnp.int8), ("fp8", jnp.float8_e4m3fn), ("bfloat16", jnp.bfloat16)):
        assert loaded(weights=weights)[1] == dtype
    assert loaded(weights="bfloat16")[0].dtype == jnp.bfloat16
    assert loaded()[1] == loaded(weights="stored")[1] == jnp.float32
    llm, _ = loaded(weights="int8")
    answer = llm.generate(PROMPT, SamplingParams(max_tokens=8))[0]
    assert len(answer.token_ids) == 8
