"""One context, many questions: read once, asked as often as one likes; and several answers to one prompt."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import prompt

from jaxkv import H2O, LLM, Auto, KVCompress, LeanKV, SamplingParams, compress, decode, fork, prefill
from jaxkv.requests import Finished, TextMade

pytestmark = pytest.mark.once
CONTEXT = prompt(180, 5)
QUESTIONS = [prompt(n, 30 + n) for n in (9, 14, 5, 21, 11)]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
POLICIES = {
    "full cache": None,
    "evicted": KVCompress(ratio=4, window=8, protected_window=8),
    "two precisions": Auto(ratio=4),
    "leankv": LeanKV(ratio=4),
}

QUICK = ("evicted", "leankv")


def by_hand(policy, questions, tokens=8):
    """Prefill, compress, fork, prefill again."""
    layout = None if policy is None else policy.placement.layout(tiny.CONFIG.head_dim)
    rows = 1 + len(questions)
    cache = tiny.empty_cache(batch=rows, max_context=256, layout=layout)
    ids, lengths = jnp.zeros((rows, 192), jnp.int32).at[0, : len(CONTEXT)].set(CONTEXT), jnp.zeros(rows, jnp.int32)
    cache, _ = prefill(tiny.MODEL, cache, ids, lengths.at[0].set(len(CONTEXT)), policy)
    if policy is not None:
        cache = compress(cache, policy)
    cache, granted = fork(cache, 0, jnp.arange(1, rows))
    assert granted
    ids = jnp.zeros((rows, 32), jnp.int32)
    for i, question in enumerate(questions, 1):
        ids, lengths = ids.at[i, : len(question)].set(question), lengths.at[i].set(len(question))
    cache, logits = prefill(tiny.MODEL, cache, ids, lengths)
    first = jnp.argmax(logits, -1).astype(jnp.int32)
    made = decode(tiny.MODEL, cache, first, jnp.where(lengths > 0, tokens - 1, 0), steps=tokens - 1)
    return [[int(first[i]), *made.tokens[i].tolist()] for i in range(1, rows)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in POLICIES]
)
def test_answers_are_those_of_the_functional_layer(name, tmp_path):
    policy = POLICIES[name]
    llm = LLM(tiny.MODEL, max_batch=4)
    context = llm.read(CONTEXT, compression=policy)
    wanted = by_hand(policy, QUESTIONS)
    assert [a.token_ids for a in context.ask(QUESTIONS, PARAMS)] == wanted
    assert context.ask(QUESTIONS[2], max_tokens=8, ignore_eos=True)[0].token_ids == wanted[2]
    assert [a.token_ids for a in context.ask(QUESTIONS[::-1], PARAMS)] == wanted[::-1]
    context.save(tmp_path / "context.npz")
    assert (tmp_path / "context.npz").stat().st_size < context.nbytes + 5000
    again = LLM(tiny.MODEL).load_context(tmp_path / "context.npz")
    assert again.nbytes == context.nbytes
    assert [a.token_ids for a in again.ask(QUESTIONS[:2], PARAMS)] == wanted[:2]


def test_a_context_can_be_given_back():
    llm = LLM(tiny.MODEL, compression="kv-compress", ratio=4)
    with llm.read(CONTEXT) as context:
        assert context.tokens == len(CONTEXT)
        assert context.nbytes < llm.read(CONTEXT, compression=None).nbytes / 3
        assert repr(context) == "<Context of 180 tokens, 0.0 MB>"
    with pytest.raises(ValueError, match="was given back"):
        context.ask([1, 2])


def test_a_small_memory_answers_a_few_at_a_time():
    llm = LLM(tiny.MODEL, max_batch=8, cache_memory=200_000)
    context = llm.read(CONTEXT, ratio=4)
    long = replace(PARAMS, max_tokens=60)
    together = [a.token_ids for a in context.ask(QUESTIONS, long)]
    assert together == [a.token_ids for a in LLM(tiny.MODEL).read(CONTEXT, ratio=4).ask(QUESTIONS, long)]
    llm.cache_memory = 40_000
    with pytest.raises(ValueError, match="holds no question; give at least"):
        context.ask(QUESTIONS, long)


def test_what_can_t_be_asked_is_refused(tmp_path):
    context = LLM(tiny.MODEL).read(CONTEXT, ratio=4)
    with pytest.raises(ValueError, match="the prompt is empty"):
        context.ask([[]])
    with pytest.raises(ValueError, match="has 340 tokens after 180 of what was read, but the model's context is 512"):
        context.ask(prompt(340))
    with pytest.raises(ValueError, match="no tokenizer"):
        context.ask("why?")
    assert context.ask([]) == []
    context.save(tmp_path / "context.npz")
    with pytest.raises(ValueError, match="and this model needs 2 and 2 in blocks"):
        LLM(tiny.MODEL, cache_dtype="bfloat16").load_context(tmp_path / "context.npz")
    with pytest.raises(ValueError, match="was read by a model with other weights"):
        LLM(tiny.random_model(seed=8)).load_context(tmp_path / "context.npz")
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no context that was saved"):
        LLM(tiny.MODEL).load_context(tmp_path / "other")


def test_questions_go_on_with_a_conversations_last_message():
    llm = LLM("smollm2-135m")
    story = "Mr. Weston was a native of Highbury. His son is Frank Churchill.\n"
    begins, question = [{"role": "system", "content": "Be brief."}], "Who is the son of Mr. Weston?"
    with llm.read([*begins, {"role": "user", "content": story}]) as context:
        [asked] = context.ask(question, max_tokens=8)
    [whole] = llm.chat([*begins, {"role": "user", "content": story + question}], max_tokens=8)
    assert asked.token_ids == whole.token_ids
    with pytest.raises(ValueError, match="the last message must be the user's"):
        llm.read(begins)


DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)


@pytest.mark.parametrize(
    "policy",
    [
        None,
        H2O(ratio=4, compress_every=8, protected_window=8),
        pytest.param(KVCompress(ratio=4, window=8), marks=pytest.mark.slow),
        pytest.param(LeanKV(ratio=4), marks=pytest.mark.slow),
    ],
)
def test_several_answers_are_those_of_as_many_seeds(policy):
    llm = LLM(tiny.MODEL, compression=policy, max_batch=4)
    [answer] = llm.generate(CONTEXT, DRAWN, n=4)
    assert llm.engine.prompt_tokens == len(CONTEXT)
    alone = [llm.generate(CONTEXT, DRAWN, seed=7 + i)[0].token_ids for i in range(4)]
    assert [choice.token_ids for choice in answer.choices] == alone
    assert len({tuple(ids) for ids in alone}) > 1
    assert answer.others[0].others == []


def test_the_blocks_of_a_prompt_are_held_once():
    llm = LLM(tiny.MODEL, max_batch=8)
    free = []
    for event in llm.events([CONTEXT[:176]], replace(DRAWN, n=8, max_tokens=17)):
        if isinstance(event, TextMade):
            free.append(llm.engine.counts.free.raw)
    heads, total = 4, llm.engine.config.num_blocks - 1
    assert total - free[0] == heads * 11
    assert total - min(free) <= heads * (11 + 8 * 2)
    assert llm.engine.counts.free.raw == total


def test_several_prompts_may_want_several_answers_each():
    llm = LLM(tiny.MODEL, max_batch=4, cache_memory=250_000)
    jobs = [(CONTEXT, replace(DRAWN, n=3)), (prompt(40, 2), DRAWN), (prompt(150, 3), replace(DRAWN, n=4))]
    jobs.append((prompt(60, 4), replace(DRAWN, n=2, compression="kv-compress", ratio=2)))
    done = {e.request: e.completion for e in llm.run(jobs, max_context=256) if isinstance(e, Finished)}
    assert {i: len(done[i].choices) for i in done} == {0: 3, 1: 1, 2: 4, 3: 2}
    tiny.assert_no_block_is_lost_or_shared(llm.engine.cache)
    roomy = LLM(tiny.MODEL, max_batch=1)
    for i, (ids, params) in enumerate(jobs):
        for j, choice in enumerate(done[i].choices):
            assert choice.token_ids == roomy.generate(ids, params, n=1, seed=7 + j)[0].token_ids
    with pytest.raises(ValueError, match="n=2 answers are decoded together, and max_batch is 1"):
        roomy.generate(CONTEXT, n=2)


def test_questions_may_want_several_answers_too():
    context = LLM(tiny.MODEL, max_batch=4).read(CONTEXT, ratio=4)
    answers = context.ask(QUESTIONS[:2], DRAWN, n=3)
    for question, answer in zip(QUESTIONS, answers, strict=False):
        alone = [context.ask(question, DRAWN, seed=7 + i)[0].token_ids for i in range(3)]
        assert [choice.token_ids for choice in answer.choices] == alone


def test_preempted_answers_to_one_prompt_are_read_again_each_for_itself():
    llm = LLM(tiny.MODEL, max_batch=4, cache_memory=170_000)
    params = replace(DRAWN, max_tokens=200, ignore_eos=False, logit_bias={100: -100}, n=4)
    [answer] = [e.completion for e in llm.run([(prompt(40, 1), params)], max_context=256) if isinstance(e, Finished)]
    assert llm.engine.preemptions > 0
    roomy = LLM(tiny.MODEL, max_batch=1)
    alone = [roomy.generate(prompt(40, 1), params, n=1, seed=7 + i)[0].token_ids for i in range(4)]
    assert [choice.token_ids for choice in answer.choices] == alone
    assert np.isfinite(answer.timings.decode)
