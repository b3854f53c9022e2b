"""Random traces through a pool that is too small for all: nothing is lost or shared, and every answer is as alone."""

from dataclasses import replace
from functools import cache

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxkv.engine.reading
import jaxkv.engine.scheduler
from jaxkv import LLM, KVCompress, MaxTokens, Ratio, SamplingParams
from jaxkv.cache import CacheConfig
from jaxkv.engine.prefixes import AHEAD
from jaxkv.engine.schedule import Latency
from jaxkv.requests import Finished, PromptRead, Refused, TextMade

pytestmark = pytest.mark.once

POLICIES = {
    "full cache": None,
    "compressed once": KVCompress(budget=Ratio(ratio=3), window=8, protected_window=8),
    "compressed again": KVCompress(budget=Ratio(ratio=3), window=8, protected_window=8, compress_every=12),
}
ROWS, CONTEXT, BLOCKS = 3, 160, 44
"""Three rows whose prompts and answers may take up to 40 blocks each, in a pool of 44."""
MEMORY = CacheConfig.for_model(tiny.CONFIG, batch=4, max_context=256).bytes_with(BLOCKS + 1)


@pytest.fixture(autouse=True, scope="module")
def rash():
    """Requests join with no thought of the next dispatch, so that the pool does run dry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxkv.engine.scheduler.Scheduler, "expected", lambda self, sequence: 1)
        yield


EARLY: set[int] = set()
"""Requests of the present run that were compressed out of turn, since the pool ran dry: they may differ from alone."""


@pytest.fixture(autouse=True)
def early():
    compress = jaxkv.engine.Engine._compress

    def noted(self, rows, *args, **settings):
        EARLY.update(sequence.index for sequence in map(self.scheduler.sequence, rows) if sequence.replayed)
        compress(self, rows, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxkv.engine.Engine, "_compress", noted)
        yield


@cache
def served(policy):
    """One LLM a policy, since its programs are compiled once."""
    return LLM(tiny.MODEL, compression=POLICIES[policy], cache_memory=MEMORY, max_batch=ROWS)


@cache
def roomy(policy):
    return LLM(tiny.MODEL, compression=POLICIES[policy], max_batch=1)


@cache
def alone(policy, job):
    [answer] = roomy(policy).generate(*request(job))
    return answer


def request(job):
    length, tokens, seed = job
    temperature = 1.0 if seed % 3 == 0 else 0.0
    params = SamplingParams(max_tokens=tokens, seed=seed, temperature=temperature, ignore_eos=seed % 2 == 0)
    return tiny.prompt(length, seed).tolist(), params


def run(policy, jobs):
    """Answers by index, after checking the blocks at every event."""
    llm, answers, streamed = served(policy), {}, {}
    EARLY.clear()
    for event in llm.run((request(job) for job in jobs), max_context=CONTEXT):
        tiny.assert_no_block_is_lost_or_shared(llm.engine.cache, llm.engine.prefixes)
        match event:
            case Finished(request=i, completion=completion):
                assert i not in answers
                answers[i] = completion
            case TextMade(request=i, token_ids=token_ids):
                streamed.setdefault(i, []).extend(token_ids)
            case Refused():
                raise AssertionError(event)
    assert int(llm.engine.cache.raw.tables.free.count) == BLOCKS
    for i, answer in answers.items():
        assert streamed.get(i, []) == answer.token_ids
    return answers, llm.engine


JOB = st.tuples(st.integers(1, 110), st.integers(1, 50), st.integers(0, 5))
JOBS = st.lists(JOB, min_size=1, max_size=6)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=8)
@given(jobs=JOBS)
def test_every_answer_is_as_alone(policy, jobs):
    answers, _ = run(policy, jobs)
    assert sorted(answers) == list(range(len(jobs)))
    for i, job in enumerate(jobs):
        early, wanted = i in EARLY, alone(policy, job)
        assert early or answers[i].token_ids == wanted.token_ids
        assert early or answers[i].finish_reason == wanted.finish_reason
        assert answers[i].cache.blocks_held == wanted.cache.blocks_held
        assert early or answers[i].cache_at_end.kvs_held == wanted.cache_at_end.kvs_held
        assert not early or policy == "compressed again"


OVERCOMMITTED = [(60, 50, 1), (50, 50, 2), (40, 50, 4), (90, 10, 3), (30, 50, 5)]


def test_an_over_committed_trace_ends_with_the_right_answers():
    """Three grow beyond the pool together: the youngest is put back and replayed, and nobody waits for ever."""
    answers, engine = run("full cache", OVERCOMMITTED)
    assert engine.preemptions > 0
    for i, job in enumerate(OVERCOMMITTED):
        assert answers[i].token_ids == alone("full cache", job).token_ids


@settings(max_examples=4)
@given(jobs=st.lists(st.tuples(JOB, st.sampled_from(list(POLICIES))), min_size=2, max_size=6))
def test_requests_bring_their_own_policies(jobs):
    """In one run, each answered as by a model that has its policy for all."""
    llm, answers = served("compressed once"), {}
    EARLY.clear()

    def own(job, policy):
        prompt, params = request(job)
        return prompt, replace(params, compression=POLICIES[policy])

    for event in llm.run((own(*job) for job in jobs), max_context=CONTEXT):
        tiny.assert_no_block_is_lost_or_shared(llm.engine.cache, llm.engine.prefixes)
        if isinstance(event, Finished):
            answers[event.request] = event.completion
    for i, (job, policy) in enumerate(jobs):
        assert i in EARLY or answers[i].token_ids == alone(policy, job).token_ids
        assert answers[i].cache.blocks_held == alone(policy, job).cache.blocks_held


def test_a_requests_impossible_budget_is_refused_alone():
    prompt, params = request((60, 5, 2))
    mean = replace(params, compression=KVCompress(budget=MaxTokens(tokens=3)))
    events = list(served("full cache").run(iter([(prompt, mean), (prompt, params)]), max_context=CONTEXT))
    [refused] = [e for e in events if isinstance(e, Refused)]
    assert refused.request == 0
    assert "max_cache_tokens=3 leaves 3 tokens a head" in refused.error
    assert [e.request for e in events if isinstance(e, Finished)] == [1]


def test_freed_memory_is_another_requests():
    """The same pool holds more requests at once where they are compressed."""

    def most_together(policy):
        llm, begun, ended, most = served(policy), set(), set(), 0
        for event in llm.run((request((96, 20, 2)) for _ in range(4)), max_context=CONTEXT):
            if isinstance(event, PromptRead):
                begun.add(event.request)
            if isinstance(event, Finished):
                ended.add(event.request)
            most = max(most, len(begun - ended))
        assert ended == set(range(4))
        return most

    assert most_together("full cache") == 1
    assert most_together("compressed once") >= 2


def test_running_requests_go_on_while_a_prompt_is_read(monkeypatch):
    llm = LLM(tiny.MODEL, max_batch=2, schedule=Latency())
    monkeypatch.setattr(jaxkv.engine.reading, "CHUNK", 64)
    long = tiny.prompt(tiny.CONFIG.max_context - 60, 7).tolist()
    jobs = [(tiny.prompt(5).tolist(), SamplingParams(max_tokens=300, ignore_eos=True)), (long, SamplingParams())]
    seen = [(type(e).__name__, e.request) for e in llm.run(iter(jobs))]
    began, read = (f(i for i, e in enumerate(seen) if e == ("PromptRead", 1)) for f in (min, max))
    assert ("TextMade", 0) in seen[began:read]
    assert {r for name, r in seen if name == "Finished"} == {0, 1}


def test_requests_are_drawn_only_when_there_is_room():
    drawn = []

    def jobs():
        for i in range(2 * (ROWS + AHEAD)):
            drawn.append(i)
            yield request((20, 30, 2))

    events = served("full cache").run(jobs(), max_context=CONTEXT)
    next(events)
    assert len(drawn) <= ROWS + AHEAD
    assert sum(isinstance(e, Finished) for e in events) == 2 * (ROWS + AHEAD)


def test_what_cannot_be_served_is_refused_and_the_others_go_on():
    llm = served("full cache")
    good = request((20, 5, 2))
    jobs = [
        ([], SamplingParams()),
        good,
        (tiny.prompt(159).tolist(), SamplingParams(max_tokens=400)),
        ("text", SamplingParams()),
    ]
    jobs += [(tiny.prompt(160).tolist(), SamplingParams()), good]
    events = list(llm.run(iter(jobs), max_context=CONTEXT))
    refused = {e.request: e.error for e in events if isinstance(e, Refused)}
    assert sorted(refused) == [0, 3, 4]
    assert "is empty" in refused[0]
    assert "no tokenizer" in refused[3]
    assert refused[4].startswith("the prompt has 160 tokens, but the model's context is 160")
    assert {e.request for e in events if isinstance(e, Finished)} == {1, 2, 5}


def test_an_answer_that_outgrows_the_pool_is_refused_in_time():
    tight = CacheConfig.for_model(tiny.CONFIG, batch=1, max_context=512).bytes_with(30)
    llm = LLM(tiny.MODEL, compression=POLICIES["compressed once"], cache_memory=tight, max_batch=1)
    jobs = [(tiny.prompt(90).tolist(), SamplingParams(max_tokens=400, ignore_eos=True)), request((60, 5, 2))]
    events = list(llm.run(iter(jobs)))
    [refused] = [e for e in events if isinstance(e, Refused)]
    assert refused.request == 0
    assert "400 more tokens may need 100; give cache_memory of at least" in refused.error
    assert [e.request for e in events if isinstance(e, Finished)] == [1]


@pytest.mark.parametrize("context", [1, 513])
def test_a_context_that_the_model_lacks_is_refused(context):
    with pytest.raises(ValueError, match=f"between 2 and the model's 512, got {context}"):
        next(served("full cache").run(iter([]), max_context=context))
