"""Steps that are sent before the last ones were looked at change no answer."""

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv import LLM, KVCompress, Ratio, SamplingParams
from jaxkv.engine import Engine
from jaxkv.engine.scheduler import Scheduler
from jaxkv.requests import Finished

pytestmark = pytest.mark.once

AGAIN = KVCompress(budget=Ratio(ratio=3), window=8, protected_window=8, compress_every=12)


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.MODEL, max_batch=4, share_prefixes=False)


def served(llm, jobs, *, ahead):
    """Answers, and for each dispatch that was sent ahead how many others waited."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        send = Engine._send

        def noted(self, *args, after=None):
            if after is not None:
                sent.append(len(self.scheduler.queue))
            return send(self, *args, after=after)

        patch.setattr(Engine, "_send", noted)
        if not ahead:
            patch.setattr(Scheduler, "steps_ahead", lambda *_: 0)
        answers = {e.request: e.completion for e in llm.run(iter(jobs), max_context=256) if isinstance(e, Finished)}
    tiny.assert_no_block_is_lost_or_shared(llm.engine.cache, llm.engine.prefixes)
    return answers, sent


JOB = st.tuples(st.integers(1, 60), st.integers(1, 120), st.booleans(), st.sampled_from([None, AGAIN]))


@settings(max_examples=12)
@given(jobs=st.lists(JOB, min_size=1, max_size=6))
def test_answers_are_the_same(llm, jobs):
    requests = [
        (
            tiny.prompt(length, seed=length).tolist(),
            SamplingParams(max_tokens=tokens, ignore_eos=ignore, temperature=0.7, seed=tokens, compression=policy),
        )
        for length, tokens, ignore, policy in jobs
    ]
    got, _ = served(llm, requests, ahead=True)
    wanted, none = served(llm, requests, ahead=False)
    assert none == []
    assert sorted(got) == sorted(wanted) == list(range(len(jobs)))
    for index, completion in wanted.items():
        assert got[index].token_ids == completion.token_ids
        assert got[index].finish_reason == completion.finish_reason
        assert got[index].cache_at_end.kvs_held == completion.cache_at_end.kvs_held
        assert np.array_equal(got[index].cache_at_end.blocks_per_head, completion.cache_at_end.blocks_per_head)


def test_most_dispatches_of_a_steady_batch_are_sent_ahead(llm):
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    answers, ahead = served(llm, [(tiny.prompt(20, seed).tolist(), params) for seed in range(4)], ahead=True)
    assert len(ahead) == 6, "of seven"
    assert all(len(answer.token_ids) == 100 for answer in answers.values())


@pytest.mark.parametrize("settings", [{"ignore_eos": False}, {"ignore_eos": True}], ids=["ends", "never ends"])
def test_who_waits_for_an_end_is_let_in_at_once(llm, settings):
    """While others wait, nothing is sent past an end that nobody could foresee."""
    params = SamplingParams(max_tokens=100, **settings)
    _, ahead = served(llm, [(tiny.prompt(20, seed).tolist(), params) for seed in range(5)], ahead=True)
    assert (1 in ahead) == settings["ignore_eos"]
    assert 0 in ahead
