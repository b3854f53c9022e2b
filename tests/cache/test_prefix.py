"""Prompts that start alike: their prefix is read once, no answer changes, no block is lost, nobody waits for ever."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv import LLM, KVCompress, Ratio, SamplingParams
from jaxkv.cache import CacheConfig, own, prefix
from jaxkv.generation.prefill import prefill
from jaxkv.policies import H2O
from jaxkv.requests import Finished, Refused

pytestmark = pytest.mark.once

POLICIES = {
    "full cache": None,
    "compressed again": KVCompress(budget=Ratio(ratio=3), window=8, protected_window=8, compress_every=12),
}
ROWS, CONTEXT = 3, 320


def memory(blocks):
    return CacheConfig.for_model(tiny.CONFIG, batch=ROWS, max_context=CONTEXT).bytes_with(blocks + 1)


@cache
def served(policy, blocks):
    return LLM(tiny.MODEL, compression=POLICIES[policy], cache_memory=memory(blocks), max_batch=ROWS)


@cache
def roomy(policy):
    return LLM(tiny.MODEL, compression=POLICIES[policy], max_batch=1, share_prefixes=False)


@cache
def alone(policy, job):
    events = roomy(policy).run([request(job)], max_context=CONTEXT)
    [answer] = [event.completion for event in events if isinstance(event, Finished)]
    return answer


DOCUMENTS = [tiny.prompt(256, 11).tolist(), tiny.prompt(150, 12).tolist() + tiny.prompt(60, 13).tolist()]
DOCUMENTS.append(DOCUMENTS[1][:150] + tiny.prompt(90, 14).tolist())


def request(job):
    document, question, seed, tokens = job
    prompt = DOCUMENTS[document] + tiny.prompt(question, seed).tolist()
    return prompt, SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=True)


def run(llm, jobs):
    """Answers by index, after checking the blocks at every event."""
    answers = {}
    for event in llm.run((request(job) for job in jobs), max_context=CONTEXT):
        tiny.assert_no_block_is_lost_or_shared(llm.engine.cache, llm.engine.prefixes)
        assert not isinstance(event, Refused), event
        if isinstance(event, Finished):
            answers[event.request] = event.completion
    assert int(llm.engine.cache.raw.tables.free.count) == llm.engine.config.num_blocks - 1
    return answers


JOBS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(0, 2), st.sampled_from([1, 14, 24])),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize(("policy", "blocks"), [("full cache", 150), ("full cache", 82), ("compressed again", 82)])
@settings(max_examples=5)
@given(jobs=JOBS)
def test_every_answer_is_as_alone(policy, blocks, jobs):
    """Also in a pool that barely holds one of them, where prefixes must go and sequences are put back."""
    answers = run(served(policy, blocks), jobs)
    assert sorted(answers) == list(range(len(jobs)))
    for i, job in enumerate(jobs):
        assert answers[i].token_ids == alone(policy, job).token_ids
        assert answers[i].cache.blocks_held == alone(policy, job).cache.blocks_held


@pytest.mark.parametrize("policy", POLICIES)
def test_a_document_is_read_once_for_all_its_questions(policy):
    jobs = [(0, 9 + i, i, 4) for i in range(8)]
    llm = served(policy, 150)
    run(llm, jobs)
    tails = [9 + i for i in range(8)]
    spare = [max(8 - tail, 0) for tail in tails]
    assert spare == [0] * 8
    assert llm.engine.prompt_tokens == 256 + sum(tails)
    assert llm.engine.borrowed_tokens == 7 * 256


def test_rows_of_the_full_cache_hold_one_copy_together():
    """64 blocks for the document, and 12 for a question and its answer: not even two fit in 150 if none is shared."""
    llm, most = served("full cache", 150), 0
    for _ in llm.run((request((0, 5, i, 40)) for i in range(3)), max_context=CONTEXT):
        most = max(most, sum(row is not None for row in llm.engine.rows))
    assert most == 3
    assert llm.engine.preemptions == 0


def test_what_a_policy_observes_is_read_by_each_itself():
    """The window's queries: a question shorter than it shares less; a policy that observes all shares nothing."""
    for policy, tokens in [(KVCompress(budget=Ratio(ratio=2), window=40), 240), (H2O(budget=Ratio(ratio=2)), 0)]:
        llm = LLM(tiny.MODEL, compression=policy, cache_memory=memory(200), max_batch=ROWS)
        answers = run(llm, [(0, 24, 1, 4), (0, 24, 2, 4)])
        assert llm.engine.borrowed_tokens == tokens
        apart = LLM(tiny.MODEL, compression=policy, max_batch=1, share_prefixes=False)
        for i in range(2):
            [wanted] = apart.generate(*request((0, 24, i + 1, 4)))
            assert answers[i].token_ids == wanted.token_ids
            assert (answers[i].cache.blocks_per_head == wanted.cache.blocks_per_head).all()


def test_full_and_compressed_requests_share_in_either_order():
    llm, jobs = served("full cache", 150), [(0, 24, 1, 14), (0, 30, 2, 14)]
    for kinds in ("full cache", "compressed again"), ("compressed again", "full cache"):
        asked = zip(map(request, jobs), kinds, strict=True)
        requests = [(prompt, replace(params, compression=POLICIES[kind])) for (prompt, params), kind in asked]
        for event in llm.run(requests, max_context=CONTEXT):
            tiny.assert_no_block_is_lost_or_shared(llm.engine.cache, llm.engine.prefixes)
            if isinstance(event, Finished):
                wanted = alone(kinds[event.request], jobs[event.request])
                assert event.completion.token_ids == wanted.token_ids
                assert event.completion.cache.blocks_held == wanted.cache.blocks_held
                assert event.completion.cache_at_end.kvs_held == wanted.cache_at_end.kvs_held
        assert llm.engine.borrowed_tokens == 256


def test_sharing_can_be_turned_off():
    llm = LLM(tiny.MODEL, cache_memory=memory(150), max_batch=ROWS, share_prefixes=False)
    run(llm, [(0, 9, i, 4) for i in range(3)])
    assert llm.engine.borrowed_tokens == 0
    assert llm.engine.prompt_tokens == 3 * (256 + 9)


@jax.jit
def read(cache, tokens, lengths):
    return prefill(tiny.MODEL, cache, tokens, lengths)[0]


@given(blocks=st.integers(1, 5), extra=st.integers(1, 40), seed=st.integers(0, 5))
def test_a_copy_holds_what_was_borrowed_and_the_prefix_stays(blocks, extra, seed):
    cache = tiny.empty_cache(batch=2, num_blocks=100)
    ids = jnp.zeros((2, 96), jnp.int32)
    cache = read(cache, ids.at[0, : 16 * 5].set(tiny.prompt(80, seed)), jnp.array([80, 0]))
    cache, lent = prefix.detach(cache, jnp.int32(0))
    cache = prefix.attach(cache, jnp.int32(1), lent, jnp.int32(blocks))
    cache = read(cache, ids.at[1, :extra].set(tiny.prompt(extra, 9)), jnp.array([0, extra]))

    def held(cache, row):
        return [
            (
                tiny.by_position(cache, cache.raw.pool, layer, row, head),
                tiny.by_position(cache, cache.raw.scores, layer, row, head),
            )
            for layer, head in np.ndindex(2, 2)
        ]

    first, second = held(cache, 0), held(cache, 1)
    owned, all_of_it = own(cache, jnp.array([False, True]))
    assert int(owned.raw.tables.free.count) == int(cache.raw.tables.free.count) - 4 * blocks
    assert all_of_it.tolist() == [False, True]
    assert int(owned.raw.tables.free.others.sum()) == 4 * 5
    jax.tree.map(np.testing.assert_array_equal, (held(owned, 0), held(owned, 1)), (first, second))
    table = np.asarray(owned.raw.tables.block_table)
    assert not set(table[:, 1, :, : int(-(-(16 * blocks + extra) // 16))].ravel()) & set(table[:, 0, :, :5].ravel())
