"""Jobs that come while others are being answered."""

import pytest
import tiny

from jaxkv import LLM, SamplingParams
from jaxkv.requests import Finished, Refused, TextMade

pytestmark = pytest.mark.once


def test_who_has_no_job_for_now_does_not_hold_up_those_that_run():
    llm = LLM(tiny.MODEL, max_batch=4)
    jobs = [(tiny.prompt(20 + n, n), SamplingParams(max_tokens=40, ignore_eos=True)) for n in range(6)]
    jobs[3] = ([], SamplingParams())
    expected = {e.request: e.completion.token_ids for e in llm.run(jobs, max_context=256) if isinstance(e, Finished)}
    made = 0

    def one_after_the_other():
        """Each job comes only once the one before has begun its answer."""
        for number, job in enumerate(jobs):
            yield job
            before = made
            while made == before and number != 3:
                yield None

    got, refused = {}, []
    for event in llm.run(one_after_the_other(), max_context=256):
        match event:
            case TextMade():
                made += 1
            case Finished(request=request, completion=completion):
                got[request] = completion.token_ids
            case Refused(request=request):
                refused.append(request)
    assert got == expected
    assert sorted(got) == [0, 1, 2, 4, 5]
    assert refused == [3]
    assert llm.engine.passes >= 5, "they were not read together"
