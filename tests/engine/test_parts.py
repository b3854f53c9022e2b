"""Prompts larger than the pool: read in parts, each compressed before the next, within a bound, the same in company."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv import LLM, KNorm, KVCompress, MaxTokens, Policy, Ratio, SamplingParams
from jaxkv.cache import CacheConfig
from jaxkv.engine.prompt_plan import Unservable, blocks_between_parts, plan_prompt
from jaxkv.generation.compress import compress
from jaxkv.generation.prefill import prefill
from jaxkv.requests import Finished, PromptRead, Refused, Request

pytestmark = pytest.mark.once

POLICY = KVCompress(budget=Ratio(ratio=8), window=8, protected_window=8)
SUM = KVCompress(budget=Ratio(ratio=8), window=None, protected_window=8, pool=1)
BLOCKS = 42
"""Of 16 tokens, for 4 heads: 168 tokens uncompressed."""
MEMORY = CacheConfig.for_model(tiny.CONFIG, batch=2, max_context=512).bytes_with(BLOCKS + 1)
FREE = SamplingParams(max_tokens=12, ignore_eos=True)


def request(length, policy=POLICY):
    return Request(index=0, prompt=tiny.prompt(length), params=FREE, limit=12, policy=policy)


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.MODEL, compression=POLICY, cache_memory=MEMORY, max_batch=2)


def answers(llm, jobs):
    """Token ids by request and the most blocks that were in use at once."""
    made, most = {}, 0
    for event in llm.run(iter(jobs), max_context=512):
        tiny.assert_no_block_is_lost_or_shared(llm.engine.cache, llm.engine.prefixes)
        most = max(most, llm.engine.config.num_blocks - 1 - int(llm.engine.cache.raw.tables.free.count))
        assert not isinstance(event, Refused), event
        if isinstance(event, Finished):
            made[event.request] = event.completion
    return made, most


def test_a_prompt_three_times_the_pool_is_answered_within_the_bound(llm):
    prompt = tiny.prompt(500)
    made, most = answers(llm, [(prompt.tolist(), FREE)])
    config = llm.engine.config
    plan = plan_prompt(request(500), config)
    assert config.full_blocks(500) > 3 * 40
    assert plan.part < 500
    kept = config.full_blocks(500) // 8
    one_part = config.full_blocks(plan.part)
    assert most <= kept + config.heads + one_part == plan.peak_blocks <= BLOCKS
    assert made[0].cache.blocks_held == kept
    assert len(made[0].token_ids) == 12


@settings(max_examples=6)
@given(st.lists(st.tuples(st.sampled_from([500, 430, 300, 100, 20]), st.integers(0, 3)), min_size=2, max_size=4))
def test_an_answer_read_in_parts_is_the_same_in_company(llm, jobs):
    jobs = [(tiny.prompt(*job).tolist(), FREE) for job in jobs]
    together, most = answers(llm, jobs)
    assert most <= BLOCKS
    for i, job in enumerate(jobs):
        alone, _ = answers(llm, [job])
        assert together[i].token_ids == alone[0].token_ids
        assert together[i].cache.blocks_held == alone[0].cache.blocks_held


@partial(jax.jit, static_argnums=4)
def read(cache, tokens, lengths, total, policy):
    cache, logits = prefill(tiny.MODEL, cache, tokens, lengths, policy)
    return cache, compress(cache, policy, tokens=total), logits


@pytest.mark.parametrize("policy", [POLICY, SUM], ids=["last queries", "all queries"])
def test_a_part_attends_to_what_earlier_ones_left_and_to_itself(policy):
    """Beside the dense model, in which each query sees the KVs that were there when its part was read."""
    total, part = 240, 96
    ids = tiny.prompt(total, 5)
    cache = tiny.empty_cache(max_context=256)
    visible = np.zeros((2, 2, total, total), bool)
    for start in range(0, total, part):
        end = min(start + part, total)
        for layer, head in np.ndindex(2, 2):
            kept = list(tiny.by_position(cache, cache.raw.positions, layer, 0, head))
            visible[layer, head, start:end, kept] = True
            visible[layer, head, start:end, start:end] = np.tri(end - start, dtype=bool)
        tokens = jnp.zeros((1, part), jnp.int32).at[0, : end - start].set(ids[start:end])
        whole, cache, logits = read(cache, tokens, jnp.array([end - start]), jnp.array([total]), policy)
        assert int(tiny.blocks_held(cache).sum()) <= 4 * 15 // 8 + 3
        dense, probabilities = tiny.dense_run(ids[:end], visible[..., :end, :end])
        np.testing.assert_allclose(logits[0], dense[end - 1], rtol=2e-3, atol=2e-3)
    for layer, head in np.ndindex(2, 2):
        scores = tiny.by_position(whole, whole.raw.scores, layer, 0, head)
        queries = slice(-policy.window if policy.window else None, None)
        mass = (probabilities[layer, 3 * head : 3 * head + 3, queries] ** 2).sum(1)[:, list(scores)]
        reach = policy.pool // 2  # pooled in table order, which is that of the dictionary
        mass = np.pad(mass, ((0, 0), (reach, reach)), constant_values=-np.inf)
        pooled = np.lib.stride_tricks.sliding_window_view(mass, policy.pool, axis=1).max(-1)
        np.testing.assert_allclose(list(scores.values()), pooled.sum(0), rtol=2e-3, atol=1e-5)


def test_a_budget_or_a_pool_that_leaves_no_room_for_parts_is_refused(llm):
    for policy, message in [
        (Ratio(ratio=1), "needs 124 blocks while it is read"),
        (MaxTokens(tokens=480), "needs 124"),
    ]:
        tight = LLM(tiny.MODEL, compression=KVCompress(budget=policy), cache_memory=MEMORY, max_batch=2)
        with pytest.raises(ValueError, match=message):
            tight.generate(tiny.prompt(490).tolist(), FREE)
    full = LLM(tiny.MODEL, cache_memory=MEMORY, max_batch=2)
    with pytest.raises(ValueError, match="needs 128 blocks with its answer"):
        full.generate(tiny.prompt(500).tolist(), FREE)


def test_a_policy_that_protects_more_than_its_budget_is_refused_on_the_way():
    class Miser(KVCompress):
        def protects(self, positions, num_tokens):
            return positions >= 0

    policy: Policy = Miser(budget=Ratio(ratio=8), window=8, protected_window=8)
    llm = LLM(tiny.MODEL, compression=policy, cache_memory=MEMORY, max_batch=2)
    jobs = [(tiny.prompt(500).tolist(), FREE), (tiny.prompt(20).tolist(), FREE)]
    events = list(llm.run(iter(jobs), max_context=512))
    [refused] = [e for e in events if isinstance(e, Refused)]
    assert "of its 500 tokens are read and compressed" in refused.error
    assert [e.request for e in events if isinstance(e, Finished)] == [1]
    assert int(llm.engine.cache.raw.tables.free.count) == BLOCKS


@given(tokens=st.integers(1, 3000), blocks=st.integers(8, 400), ratio=st.floats(1, 64), window=st.integers(1, 100))
def test_parts_cover_the_prompt_within_the_pool(tokens, blocks, ratio, window):
    config = CacheConfig.for_model(tiny.CONFIG, batch=1, max_context=3072, num_blocks=blocks + 1)
    policy = KVCompress(budget=Ratio(ratio=ratio), window=8, protected_window=window)
    plan = plan_prompt(request(tokens, policy), config)
    kept = blocks_between_parts(config, policy, tokens)
    if isinstance(plan, Unservable):
        assert config.full_blocks(tokens) > blocks
        assert kept + config.full_blocks(max(64, 2 * window)) > blocks
    else:
        assert plan.peak_blocks <= blocks
        parts = -(-tokens // plan.part)
        assert 0 <= plan.part * parts - tokens < parts  # as equal as can be


def test_a_prompt_is_split_to_join_sooner_where_its_scores_allow_it_or_it_is_said():
    """Beside one that is answering, in a pool that has no room for the whole prompt."""
    llm = {}
    keys = KNorm(budget=Ratio(ratio=8), protected_window=8)
    for policy, split in ((keys, None), (keys, False), (POLICY, None), (POLICY, True)):
        llm[policy, split] = LLM(
            tiny.random_model(replace(tiny.CONFIG, max_context=2048)),
            compression=policy,
            cache_memory=CacheConfig.for_model(tiny.CONFIG, batch=2, max_context=2048).bytes_with(4 * 100 + 1),
            max_batch=2,
            split_prompts=split,
        )
    first = (tiny.prompt(900, seed=1).tolist(), SamplingParams(max_tokens=200, ignore_eos=True))
    second = (tiny.prompt(1500, seed=2).tolist(), SamplingParams(max_tokens=5, ignore_eos=True))
    together = {}
    for key, each in llm.items():
        begun, ended, together[key] = set(), set(), False
        for event in each.run(iter([first, second])):
            tiny.assert_no_block_is_lost_or_shared(each.engine.cache, each.engine.prefixes)
            begun |= {event.request} if isinstance(event, PromptRead) else set()
            ended |= {event.request} if isinstance(event, Finished) else set()
            together[key] |= begun == {0, 1} and not ended
        assert ended == {0, 1}
    assert list(together.values()) == [True, False, False, True]
