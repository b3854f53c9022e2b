"""Prompts in, answers out: as the dense model would say, alone or in company, and with clear refusals."""

import copy
import pickle
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxkv import LLM, CacheConfig, KVCompress, MaxBytes, MaxTokens, Ratio, SamplingParams, init_cache, stats
from jaxkv.requests import Finished, PromptRead
from models import Llama

pytestmark = pytest.mark.once

HEADS = 4
BLOCK_BYTES = 16 * (2 * 16 * 4 + 8)


class Letters:
    """A tokenizer of 100 characters, one each, with the interface of models.Tokenizer."""

    eos_ids = (100,)

    def encode(self, text):
        return [ord(c) - 32 for c in text]

    def decode(self, ids):
        return "".join(chr(i + 32) for i in ids if i != 100)

    def stream(self):
        return self

    def push(self, token):
        return self.decode([token])

    def flush(self):
        return ""

    def chat(self, messages):
        return "".join(f"{m['role']}:{m['content']};" for m in messages)

    def encode_chat(self, text):
        return self.encode(text)


class LateLetters(Letters):
    """Gives each letter out only when the next one comes, as a decoder of unfinished characters may."""

    def __init__(self):
        self.held = ""

    def stream(self):
        return LateLetters()

    def push(self, token):
        out, self.held = self.held, self.decode([token])
        return out

    def flush(self):
        out, self.held = self.held, ""
        return out


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.MODEL)


@pytest.fixture(scope="module")
def small():
    return LLM(tiny.MODEL, compression=KVCompress(budget=Ratio(ratio=4), window=8, protected_window=8), max_batch=2)


@pytest.fixture(scope="module")
def texts():
    return LLM(tiny.MODEL, tokenizer=Letters())


FREE = SamplingParams(max_tokens=20, ignore_eos=True)
PROMPTS = [tiny.prompt(70, 1).tolist(), tiny.prompt(3, 2).tolist(), tiny.prompt(41, 3).tolist()]


def test_answers_are_the_dense_models(llm):
    for answer, prompt in zip(llm.generate(PROMPTS, FREE), PROMPTS, strict=True):
        assert answer.token_ids == tiny.dense_greedy(np.array(prompt, np.int32), 20)
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens == len(prompt)


def test_each_answer_is_as_if_alone_also_compressed_and_in_waves(small):
    together = small.generate(PROMPTS, FREE)  # three prompts, two rows: two waves
    for answer, prompt in zip(together, PROMPTS, strict=True):
        [alone] = (e.completion for e in small.run([(prompt, FREE)], max_context=256) if isinstance(e, Finished))
        assert alone.token_ids == answer.token_ids
        assert alone.cache.blocks_held == answer.cache.blocks_held


def test_little_memory_makes_waves_not_mistakes(llm):
    tight = LLM(tiny.MODEL, cache_memory=75_000)
    events = [e for e in tight.events(PROMPTS, FREE) if isinstance(e, PromptRead | Finished)]
    answers = {e.request: e.completion.token_ids for e in events if isinstance(e, Finished)}
    assert [answers[i] for i in range(3)] == [a.token_ids for a in llm.generate(PROMPTS, FREE)]
    first_end = next(i for i, e in enumerate(events) if isinstance(e, Finished))
    assert {e.request for e in events[:first_end]} == {0}
    assert {e.request for e in events[first_end + 1 :]} == {1, 2}


def test_the_cache_stays_within_its_memory():
    for memory in range(60_000, 64_000, 100):
        config = CacheConfig.for_model(tiny.CONFIG, batch=1, max_context=256, memory=memory)
        assert stats(init_cache(config)).bytes_allocated <= memory


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [
        (MaxTokens(tokens=40), HEADS * 3),
        (Ratio(ratio=3), HEADS * 13 // 3),
        (MaxBytes(size=40_000), 40_000 // BLOCK_BYTES),
    ],
)
def test_blocks_held_are_exactly_the_budgets(budget, blocks):
    llm = LLM(tiny.MODEL, compression=KVCompress(budget=budget, protected_window=8))
    [answer] = llm.generate(tiny.prompt(200).tolist(), SamplingParams(max_tokens=1))
    assert answer.cache.blocks_held == blocks
    assert answer.cache.blocks_full == HEADS * 13
    assert answer.cache.blocks_per_head.shape == (2, 2)
    assert answer.cache.blocks_per_head.sum() == blocks
    tables = 4 * (HEADS * (256 // 16 + 1) + 1)  # block tables with a length each, token count
    assert answer.cache.bytes_held == blocks * BLOCK_BYTES + tables
    assert answer.cache.bytes_full == HEADS * 13 * BLOCK_BYTES + tables


def test_an_end_token_stops_and_is_left_out(llm):
    [free] = llm.generate(PROMPTS[0], FREE)
    ends = free.token_ids[5]
    stops = LLM(tiny.MODEL, tokenizer=type("Ends", (Letters,), {"eos_ids": (ends,)})())
    [answer] = stops.generate(PROMPTS[0], SamplingParams(max_tokens=20))
    assert answer.token_ids == free.token_ids[: free.token_ids.index(ends)]
    assert answer.finish_reason == "stop"
    [ignoring] = stops.generate(PROMPTS[0], FREE)
    assert ignoring.token_ids == free.token_ids


def test_a_stop_text_cuts_the_answer_and_is_never_streamed(texts):
    [free] = texts.generate("Hello there", FREE)
    stop = free.text[7:10]
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop=(stop, "never said"))
    pieces = list(texts.stream("Hello there", params))
    [answer] = texts.generate("Hello there", params)
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert "".join(pieces) == answer.text


def test_text_that_the_tokenizer_holds_back_comes_at_the_end(texts):
    late = LLM(tiny.MODEL, tokenizer=LateLetters())
    [free] = texts.generate("Hello there", FREE)
    [answer] = late.generate("Hello there", FREE)
    assert answer.text == free.text
    assert "".join(late.stream("Hello there", FREE)) == free.text


def test_text_held_back_behind_a_stop_text_is_dropped(texts):
    late = LLM(tiny.MODEL, tokenizer=LateLetters())
    [free] = texts.generate("Hello there", FREE)
    stop = free.text[7:10]
    [answer] = late.generate("Hello there", SamplingParams(max_tokens=20, ignore_eos=True, stop=(stop,)))
    assert answer.text == free.text[: free.text.index(stop)]


def test_a_stream_joins_to_the_answer(texts):
    [answer] = texts.generate("abc", SamplingParams(max_tokens=40, ignore_eos=True))
    pieces = list(texts.stream("abc", SamplingParams(max_tokens=40, ignore_eos=True)))
    assert len(pieces) > 2
    assert "".join(pieces) == answer.text


def test_what_may_begin_a_stop_text_waits(texts):
    [free] = texts.generate("Hello there", FREE)
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop=(free.text[15:18] + "\x7f",))  # begins, never ends
    assert "".join(texts.stream("Hello there", params)) == free.text


def test_a_seed_gives_its_answer_in_any_company(llm):
    def params(seed):
        return SamplingParams(max_tokens=12, temperature=1.5, seed=seed, ignore_eos=True)

    [one] = llm.generate(PROMPTS[0], params(1))
    [again] = llm.generate(PROMPTS[0], params(1))
    [other] = llm.generate(PROMPTS[0], params(2))
    mixed = llm.generate([PROMPTS[1], PROMPTS[0], PROMPTS[2]], [FREE, params(1), params(3)])
    assert one.token_ids == again.token_ids == mixed[1].token_ids
    assert one.token_ids != other.token_ids
    assert mixed[0].token_ids == llm.generate(PROMPTS[1], FREE)[0].token_ids


def test_drawing_from_the_likeliest_alone_is_greedy(llm):
    [answer] = llm.generate(
        PROMPTS[0], SamplingParams(max_tokens=12, temperature=1.5, top_k=1, seed=5, ignore_eos=True)
    )
    assert answer.token_ids == llm.generate(PROMPTS[0], FREE)[0].token_ids[:12]


def test_logprobs_are_the_dense_models(llm):
    [answer] = llm.generate(PROMPTS[2], SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True))
    dense, _ = tiny.dense_run(np.array(PROMPTS[2] + answer.token_ids, np.int32))
    at = np.arange(len(PROMPTS[2]) - 1, len(PROMPTS[2]) + 5)
    wanted = dense[at, answer.token_ids] - np.logaddexp.reduce(dense[at], axis=-1)
    np.testing.assert_allclose(answer.logprobs, wanted, atol=1e-4)
    assert llm.generate(PROMPTS[2], FREE)[0].logprobs is None


def test_an_answer_ends_with_the_context(llm):
    prompt = tiny.prompt(tiny.CONFIG.max_context - 5).tolist()
    [answer] = llm.generate(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    assert len(answer.token_ids) == 5
    assert answer.finish_reason == "length"


def test_a_stream_left_half_way_leaves_the_model_usable(texts):
    [before] = texts.generate("Hello there", FREE)
    stream = texts.stream("Hello there", SamplingParams(max_tokens=60, ignore_eos=True))
    next(stream)
    stream.close()
    [after] = texts.generate("Hello there", FREE)
    assert after.token_ids == before.token_ids


def changed(model, scale=-1.0):
    """The state of a model with other weights."""
    return jax.tree.map(lambda x: x * scale, nnx.state(model))


@pytest.mark.parametrize("how", ["update", "one weight", "a part", "another model", "another dtype"])
def test_each_call_answers_with_the_weights_that_the_model_has(how):
    model = tiny.random_model()
    llm = LLM(model)
    [before] = llm.generate(PROMPTS[0], FREE)
    match how:
        case "update":
            nnx.update(model, changed(model))
        case "one weight":
            model.norm.scale.set_value(-model.norm.scale[...])
        case "a part":
            model.layers[0].feed_forward = tiny.random_model().layers[1].feed_forward
        case "another model":
            llm.model = Llama(tiny.CONFIG, rngs=nnx.Rngs(3))
        case "another dtype":
            nnx.update(model, jax.tree.map(lambda x: (-x).astype(jnp.bfloat16), nnx.state(model)))
    [after] = llm.generate(PROMPTS[0], FREE)
    assert after.token_ids == LLM(llm.model).generate(PROMPTS[0], FREE)[0].token_ids
    assert after.token_ids != before.token_ids


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda llm: pickle.loads(pickle.dumps(llm))])
def test_a_copy_answers_the_same_and_shares_no_cache(copied):
    llm = LLM(tiny.random_model())
    [first] = llm.generate(PROMPTS[0], FREE)
    other = copied(llm)
    for each in (other, llm, other):
        assert each.generate(PROMPTS[0], FREE)[0].token_ids == first.token_ids
    assert other.engine is not llm.engine


def test_nothing_in_nothing_out(llm):
    assert llm.generate([]) == []


class Ported(nnx.Module):
    """A model that shares nothing with ours but what is asked of it."""

    sizes = tiny.CONFIG

    def __init__(self):
        self.inner = tiny.MODEL

    def __call__(self, tokens, positions, attend, state):
        return self.inner(tokens, positions, attend, state)

    def logits(self, hidden):
        return self.inner.logits(hidden)


def test_any_model_that_hands_its_kvs_over_is_taken(llm):
    ids, params = tiny.prompt(40).tolist(), SamplingParams(max_tokens=6)
    assert LLM(Ported()).generate([ids], params)[0].token_ids == llm.generate([ids], params)[0].token_ids


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"expected a models\.Decoder: .*, got a Linear without sizes, logits"):
        LLM(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_the_caches_dtype_may_differ_from_the_weights():
    half = LLM(tiny.MODEL, cache_dtype=jnp.bfloat16)
    [answer] = half.generate([tiny.prompt(40).tolist()], SamplingParams(max_tokens=6))
    assert len(answer.token_ids) == 6
    block = 16 * (2 * 16 * 2 + 8)
    assert half.engine.cache.raw.block_bytes == block
    assert answer.cache.bytes_allocated == sum(leaf.nbytes for leaf in jax.tree.leaves(half.engine.cache))
    assert half.engine.cache.raw.pool.dtype.itemsize == 2
    assert answer.cache.bytes_held < answer.cache.blocks_held * (block + 100)


def test_calls_on_one_model_may_overlap(llm):
    """Each has a cache of its own until it ends."""
    prompts, params = [tiny.prompt(40, n).tolist() for n in range(3)], SamplingParams(max_tokens=24, ignore_eos=True)
    expected = [llm.generate(p, params)[0].token_ids for p in prompts]
    first, second = (llm.events([p], params) for p in prompts[:2])
    next(first), next(second)
    next(second)  # and is never gone on with
    [ended] = [e for e in first if isinstance(e, Finished)]
    assert ended.completion.token_ids == expected[0]
    assert llm.generate(prompts[2], params)[0].token_ids == expected[2]


def test_an_old_cache_is_gone_before_there_is_a_new_one(monkeypatch):
    llm = LLM(tiny.MODEL)
    llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
    old = weakref.ref(llm.engine.cache.raw.pool)
    abandoned = weakref.ref(llm.engine)

    def none_left(config):
        assert old() is None
        assert abandoned() is None
        return init_cache(config)

    monkeypatch.setattr("jaxkv.engine.devices.init_cache", none_left)
    llm.generate([[1, 2, 3]] * 3, SamplingParams(max_tokens=2))


def test_a_cache_is_no_larger_than_the_machine_can_give(monkeypatch):
    monkeypatch.setattr("jaxkv.engine.devices.OneDevice.memory", lambda self: (300_000, 200_000))
    free = LLM(tiny.MODEL)
    free.generate([[1, 2, 3]] * 16, SamplingParams(max_tokens=2))
    assert 150_000 < sum(leaf.nbytes for leaf in jax.tree.leaves(free.engine.cache)) <= 200_000
    with pytest.raises(ValueError, match=r"more than the 300000 that this machine can give it; give less cache_memory"):
        LLM(tiny.MODEL, cache_memory=500_000).generate([1, 2, 3])


def test_logits_that_are_not_finite_are_no_answer():
    graph, weights = nnx.split(tiny.MODEL)
    damaged = LLM(nnx.merge(graph, jax.tree.map(lambda x: x * jnp.nan, weights)))
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        damaged.generate([1, 2, 3])


def test_end_tokens_outside_the_vocabulary_are_none():
    config = replace(tiny.CONFIG, eos_token_ids=(2**32 - 1, 100))
    assert LLM(Llama(config, rngs=nnx.Rngs(0)))._ends() == (100,)


def test_a_conversation_takes_the_models_format(texts):
    prompt = texts.chat_prompt([{"role": "user", "content": "hi"}])
    assert prompt == texts.tokenizer.encode("user:hi;")
    assert texts.generate(prompt, FREE)[0].token_ids == texts.generate("user:hi;", FREE)[0].token_ids
