"""What a request may ask of sampling, against the definitions and transformers' processors."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import dense_greedy, dense_run, prompt

from jaxkv import LLM, SamplingParams
from jaxkv.generation import generate

pytestmark = pytest.mark.once
IDS = prompt(40, 1)
LONG = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.MODEL, max_batch=4)


def greedy_by(change, count=24):
    """Tokens that the plain model continues with where logits are changed by what is there already."""
    tokens = IDS.tolist()
    padded = np.zeros(len(IDS) + count, np.int32)
    for at in range(len(IDS), len(padded)):
        padded[: len(tokens)] = tokens
        tokens.append(int(change(dense_run(padded)[0][at - 1].copy(), tokens[len(IDS) :]).argmax()))
    return tokens[len(IDS) :]


def answer(llm, **asked):
    return llm.generate(IDS, replace(LONG, **asked))[0]


def test_a_repetition_penalty_is_over_prompt_and_answer(llm):
    def penalised(logits, said):
        there = list({*IDS.tolist(), *said})
        logits[there] = np.where(logits[there] > 0, logits[there] / 1.3, logits[there] * 1.3)
        return logits

    assert answer(llm, repetition_penalty=1.3).token_ids == greedy_by(penalised)


def test_presence_and_frequency_penalties_are_over_the_answer(llm):
    def penalised(logits, said):
        for token in set(said):
            logits[token] -= 0.5 + 0.7 * said.count(token)
        return logits

    got = answer(llm, presence_penalty=0.5, frequency_penalty=0.7).token_ids
    assert got == greedy_by(penalised) != dense_greedy(IDS, 24)


def test_a_bias_is_added(llm):
    plain = answer(llm).token_ids
    banned = dict.fromkeys(plain, -100)
    got = answer(llm, logit_bias=banned).token_ids
    assert not set(got) & set(plain)

    def biased(logits, said):
        logits[list(banned)] -= 100
        return logits

    assert got == greedy_by(biased)
    assert answer(llm, logit_bias={str(plain[0]): 100}).token_ids == [plain[0]] * 24


def test_rows_that_ask_for_different_things_don_t_disturb_each_other(llm):
    plain = answer(llm).token_ids
    asked = [{}, {"repetition_penalty": 1.3}, {"logit_bias": {plain[0]: -100}}, {"stop_token_ids": (plain[3],)}]
    alone = [answer(llm, **each).token_ids for each in asked]
    together = llm.generate([IDS] * 4, [replace(LONG, **each) for each in asked])
    assert [a.token_ids for a in together] == alone
    assert alone[0] == plain


def test_tokens_of_ones_own_end_an_answer(llm):
    plain = answer(llm).token_ids
    end = next(i for i, token in enumerate(plain) if plain.index(token) == i and i > 2)
    stopped = answer(llm, stop_token_ids=[plain[end]])
    assert (stopped.token_ids, stopped.finish_reason) == (plain[:end], "stop")


def test_nothing_ends_an_answer_before_its_least_tokens(llm):
    plain = answer(llm).token_ids
    end = next(i for i, token in enumerate(plain) if plain.index(token) == i and i > 1)
    stopped = answer(llm, stop_token_ids=[plain[end]], min_tokens=end + 5)
    assert len(stopped.token_ids) >= end + 5
    assert plain[end] not in stopped.token_ids[: end + 5]
    assert stopped.token_ids[:end] == plain[:end]


def test_the_models_own_end_waits_for_the_least_tokens():
    ending = LLM(tiny.MODEL, logits_processor=lambda logits, position: logits.at[:, 100].add(1e6))
    assert ending.generate(IDS, max_tokens=9)[0].token_ids == []
    told = ending.generate(IDS, max_tokens=9, min_tokens=5)[0]
    assert (len(told.token_ids), told.finish_reason) == (5, "stop")
    assert told.token_ids == dense_greedy(IDS, 5)


def test_the_likeliest_tokens_come_with_theirs(llm):
    told = answer(llm, top_logprobs=3)
    assert told.token_ids == answer(llm).token_ids
    logits = dense_run(np.array([*IDS, *told.token_ids], np.int32))[0]
    for at, (token, logprob, top) in enumerate(zip(told.token_ids, told.logprobs, told.top_logprobs, strict=True)):
        row = logits[len(IDS) - 1 + at].astype(np.float64)
        row -= np.log(np.exp(row - row.max()).sum()) + row.max()
        best = np.argsort(-row)[:3]
        assert list(top) == best.tolist()
        np.testing.assert_allclose(list(top.values()), row[best], atol=1e-4)
        assert top[token] == pytest.approx(logprob, abs=1e-5)
    assert answer(llm).top_logprobs is None


def test_a_sampler_of_ones_own_chooses():
    def second_best(logits, position):
        return jnp.argsort(logits, axis=-1)[:, -2].astype(jnp.int32)

    own = LLM(tiny.MODEL, sampler=second_best)
    tokens, lengths = jnp.asarray(IDS)[None], jnp.array([len(IDS)])
    cache = tiny.empty_cache(max_context=256)
    made = generate(tiny.MODEL, cache, tokens, lengths, max_tokens=12, sampler=second_best)
    assert own.generate(IDS, max_tokens=12, ignore_eos=True)[0].token_ids == made.tokens[0].tolist()


def test_a_processor_of_ones_own_changes_logits():
    own = LLM(tiny.MODEL, logits_processor=lambda logits, position: -logits)
    assert own.generate(IDS, max_tokens=6, ignore_eos=True)[0].token_ids == greedy_by(lambda row, said: -row, 6)


def test_what_was_put_back_goes_on_with_its_penalties():
    """In a pool too small for all, so that some are read again."""
    params = SamplingParams(repetition_penalty=1.3, max_tokens=200, logit_bias={100: -100})
    prompts = [prompt(40, seed) for seed in range(4)]
    roomy = LLM(tiny.MODEL, max_batch=4, share_prefixes=False)
    tight = LLM(tiny.MODEL, max_batch=4, share_prefixes=False, cache_memory=170_000)
    assert [a.token_ids for a in tight.generate(prompts, params)] == [
        a.token_ids for a in roomy.generate(prompts, params)
    ]
    assert tight.engine.preemptions > 0


def test_likeliest_tokens_of_the_functional_layer():
    tokens, lengths = jnp.asarray(IDS)[None], jnp.array([len(IDS)])
    made = generate(tiny.MODEL, tiny.empty_cache(), tokens, lengths, max_tokens=5, top=2)
    assert made.likeliest.shape == made.their_logprobs.shape == (1, 5, 2)
    np.testing.assert_array_equal(made.likeliest[..., 0], made.tokens)
    np.testing.assert_allclose(made.their_logprobs[..., 0], made.logprobs, rtol=1e-6)
