"""What a refusal advises works when it is followed, at once."""

import re
from functools import cache

import pytest
import tiny

from jaxkv import LLM, Auto, KVCompress, LeanKV, MaxTokens, Mixed, Ratio, SamplingParams

pytestmark = pytest.mark.once

POLICIES = {
    "full": None,
    "kv-compress": KVCompress(budget=Ratio(ratio=4)),
    "tokens": KVCompress(budget=MaxTokens(tokens=64), protected_window=8),
    "leankv": LeanKV(),
    "leankv at 4x": LeanKV(budget=Ratio(ratio=4)),
    "mixed": Mixed.over(KVCompress, budget=Ratio(ratio=4)),
    "auto": Auto(budget=Ratio(ratio=4)),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("prompt", "answer"), [(6, 240), (200, 240), (240, 4)])
def test_the_memory_that_a_refusal_asks_for_is_enough(policy, prompt, answer):
    """Of a cache that holds hardly a block, and of one that holds the prompt."""
    advised = 0
    for memory in (20_000, 50_000, 90_000, 140_000):
        if refusal := refused(policy, prompt, answer, memory):
            enough = re.search(r"at least (\d+) bytes", refusal)
            assert enough, refusal
            assert refused(policy, prompt, answer, int(enough[1])) is None
            advised += 1
    assert advised


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_long_answer_to_a_short_prompt_needs_no_setting(policy):
    assert refused(policy, 6, 480, None) is None


@cache
def refused(policy, prompt, answer, memory):
    """Why the answer was refused, or None where all its tokens came."""
    try:
        llm = LLM(tiny.MODEL, cache_memory=memory, compression=policy)
        [made] = llm.generate(tiny.prompt(prompt).tolist(), SamplingParams(max_tokens=answer, ignore_eos=True))
    except ValueError as error:
        return str(error)
    assert len(made.token_ids) == answer
    return None
