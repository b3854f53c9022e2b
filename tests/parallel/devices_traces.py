"""Random traces through a pool that is too small for all, on four virtual devices: on each of them no block is lost or
shared at any event, and every answer is as one device's, alone. ``test_devices.py`` runs this file."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from eight_kv_heads import CONFIG, MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxkv.engine.scheduler
from jaxkv import LLM, KVCompress, Ratio, SamplingParams
from jaxkv.requests import Finished, Refused

DEVICES, CONTEXT, ROWS = 4, 320, 3
POLICIES = {
    "full cache": None,
    "compressed": KVCompress(budget=Ratio(ratio=4), window=8, protected_window=8),
}
SHARED = tiny.prompt(160, seed=99)


@pytest.fixture(autouse=True, scope="module")
def rash():
    """Requests join with no thought of the next dispatch, so that somebody is put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxkv.engine.scheduler.Scheduler, "expected", lambda self, sequence: 1)
        yield


@cache
def served(policy):
    """A pool of little more than one whole context."""
    need = LLM(MODEL, max_batch=1)._new_config(None, CONTEXT, rows=1).nbytes
    return LLM(MODEL, compression=POLICIES[policy], max_batch=ROWS, cache_memory=int(1.3 * need), devices=DEVICES)


@cache
def roomy(policy):
    return LLM(MODEL, compression=POLICIES[policy], max_batch=1, share_prefixes=False)


def request(job):
    begins, length, tokens, seed = job
    prompt = np.concatenate([SHARED[: 160 * begins], tiny.prompt(length, seed=seed)])
    temperature = 1.0 if seed % 3 == 0 else 0.0
    return prompt, SamplingParams(max_tokens=tokens, seed=seed, temperature=temperature, ignore_eos=seed % 2 == 0)


@cache
def alone(policy, job):
    [answer] = roomy(policy).generate(*request(job))
    return answer


def assert_each_device_is_whole(cache, prefixes) -> None:
    """Each device's own heads, free list and part of the prefixes, looked at as if there were no others."""
    tables = cache.raw.tables
    free, per = tables.free, CONFIG.num_kv_heads // DEVICES
    others, blocks = (np.split(np.asarray(each), DEVICES) for each in (free.others, free.blocks))
    table, lengths, count = np.asarray(tables.block_table), np.asarray(cache.raw.lengths), np.asarray(free.count)
    for device in range(DEVICES):
        heads = slice(device * per, (device + 1) * per)
        its_free = SimpleNamespace(others=others[device], count=count[device], blocks=blocks[device])
        its_tables = SimpleNamespace(block_table=table[:, :, heads], free=its_free)
        raw = SimpleNamespace(tables=its_tables, lengths=lengths[:, :, heads], block_size=cache.raw.block_size)
        lent = [
            SimpleNamespace(
                prefix=SimpleNamespace(table=np.asarray(kept.prefix.table)[:, heads]),
                blocks=kept.blocks,
                borrowed=kept.borrowed,
            )
            for kept in prefixes
        ]
        tiny.assert_no_block_is_lost_or_shared(SimpleNamespace(raw=raw), lent)


def run(policy, jobs):
    llm, answers = served(policy), {}
    for event in llm.run((request(job) for job in jobs), max_context=CONTEXT):
        assert not isinstance(event, Refused), event
        assert_each_device_is_whole(llm.engine.cache, llm.engine.prefixes)
        if isinstance(event, Finished):
            answers[event.request] = event.completion
    counts = np.asarray(llm.engine.cache.raw.tables.free.count)
    assert (counts == llm.engine.config.num_blocks - 1).all()
    return answers, llm.engine


def assert_as_alone(policy, jobs, answers) -> None:
    assert sorted(answers) == list(range(len(jobs)))
    for i, job in enumerate(jobs):
        assert answers[i].token_ids == alone(policy, job).token_ids
        assert answers[i].cache.blocks_held == alone(policy, job).cache.blocks_held


JOB = st.tuples(st.booleans(), st.integers(1, 100), st.integers(1, 50), st.integers(0, 5))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=5)
@given(jobs=st.lists(JOB, min_size=2, max_size=6))
def test_every_answer_is_as_on_one_device_alone(policy, jobs):
    answers, _ = run(policy, jobs)
    assert_as_alone(policy, jobs, answers)


CROWDED = [(True, 60, 90, 4), (True, 60, 90, 2), (False, 100, 90, 4), (True, 5, 50, 5)]


def test_a_trace_borrows_and_somebody_is_put_back():
    """So that the random ones are known to be able to."""
    answers, engine = run("full cache", CROWDED)
    assert engine.preemptions > 0
    assert engine.borrowed_tokens > 0
    assert_as_alone("full cache", CROWDED, answers)
