"""What is left of several prompts is read together: last chunks of long ones, short ones, and what isn't borrowed."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import AGAIN, DOCUMENT, HEADS, ONCE, Pool, config, sequence

import jaxkv.engine.reading
from jaxkv import LLM, Auto, CacheConfig, ExpectedAttention, KVCompress, Latency, Ratio, SamplingParams, init_cache
from jaxkv.engine.costs import Costs
from jaxkv.engine.engine import Engine
from jaxkv.generation.prompt import start_prompt

pytestmark = pytest.mark.once
CHUNK = 128


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Chunks small enough for the tiny model's context, and every pass as dear as another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxkv.engine.reading, "CHUNK", CHUNK)
        patch.setattr(jaxkv.engine.reading, "LONGEST_TOGETHER", CHUNK // 2)
        patch.setattr("jaxkv.engine.scheduler.LONGEST_TOGETHER", CHUNK // 2)
        patch.setattr(Costs, "of", lambda costs, work: 1.0)
        yield


def ran(lengths, *, policy=None, blocks=4000, rows=6, **settings):
    sizes = config(blocks, rows=rows)
    pool = Pool(sizes, **settings)
    pool.run(sequence(sizes, length, 4, policy, index) for index, length in enumerate(lengths))
    assert sorted(pool.ended + pool.refused) == list(range(len(lengths)))
    return pool


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ([160] * 4, 4 + 1),  # four chunks, and four rests of 32 in one pass
        ([160, 32, 20], 1 + 1),  # a rest and two short ones
        ([160], 2),
        ([256, 256], 4),  # no rest
        ([240, 240], 4),  # rests of 112 fill a chunk nearly as well
        ([190, 190, 190], 3 + 2),  # two rests of 62 fill a pass
    ],
)
def test_rests_are_read_together(lengths, passes):
    assert ran(lengths).passes == passes


def test_rests_of_different_policies_are_not():
    sizes = config(4000, rows=6)
    pool = Pool(sizes)
    policies = [None, ONCE, None, ONCE]
    pool.run(sequence(sizes, 160, 4, policy, index) for index, policy in enumerate(policies))
    assert sorted(pool.ended) == [0, 1, 2, 3]
    assert pool.passes == 8


def test_nobody_is_set_aside_for_one_who_does_not_fit():
    assert ran([160] * 4, blocks=HEADS * 15).asides == 0
    assert ran([160] * 4, blocks=HEADS * 15).passes == 8


def test_a_stream_waits_for_nobody():
    assert ran([160] * 4, schedule=Latency()).asides == 0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.integers(1, 40), st.sampled_from([None, ONCE, AGAIN]), st.booleans()),
        min_size=1,
        max_size=14,
    ),
    st.integers(60, 400),
    st.integers(1, 8),
    st.booleans(),
)
def test_every_trace_ends_and_nothing_is_promised_twice(jobs, blocks, rows, share):
    sizes = config(blocks, rows=rows)
    pool = Pool(sizes, share_prefixes=share)
    pool.run(
        sequence(sizes, length, tokens, policy, index, DOCUMENT if begins else ())
        for index, (length, tokens, policy, begins) in enumerate(jobs)
        if length + tokens + 160 * begins <= 512
    )
    expected = [i for i, (length, tokens, _, begins) in enumerate(jobs) if length + tokens + 160 * begins <= 512]
    assert Counter(pool.ended + pool.refused) == Counter(expected)
    pool.cut(pool.scheduler.prefixes.unused())
    assert pool.counts.free == pool.counts.total


POLICIES = {
    "full cache": None,
    "last queries": KVCompress(budget=Ratio(ratio=3), window=8, protected_window=8),
    "read again": Auto(budget=Ratio(ratio=3), reread=True),
    "expected queries": ExpectedAttention(budget=Ratio(ratio=3)),
}


@pytest.mark.parametrize(
    ("policy", "begins"), [("full cache", 150), ("last queries", 0), ("read again", 150), ("expected queries", 0)]
)
def test_answers_are_as_alone(policy, begins, monkeypatch):
    packed = []
    read = Engine._read_chunk

    def noted(self, reading):
        packed.append(len(reading.prompts))
        yield from read(self, reading)

    prompts = [
        [*tiny.prompt(begins, 1).tolist(), *tiny.prompt(length, 7 + length).tolist()]
        for length in (160, 30, 290, 161, 20)
    ]
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=True)
    settings = {"compression": POLICIES[policy]}
    llm = LLM(tiny.MODEL, max_batch=1, share_prefixes=False, **settings)
    alone = [llm.generate(prompt, params) for prompt in prompts]
    monkeypatch.setattr(Engine, "_read_chunk", noted)
    together = LLM(tiny.MODEL, max_batch=6, **settings).generate(prompts, params)
    for [one], other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
        np.testing.assert_array_equal(one.cache.blocks_per_head, other.cache.blocks_per_head)
        assert one.cache.kvs_held == other.cache.kvs_held
    assert max(packed) >= 2


def test_what_is_known_of_prompts_is_put_together_and_taken_apart():
    policy, rng = POLICIES["expected queries"], np.random.default_rng(0)
    cache = CacheConfig.for_model(tiny.CONFIG, batch=3, max_context=64, num_blocks=50)
    state = start_prompt(tiny.MODEL, init_cache(cache), np.array([3, 4, 5], np.int32), policy)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype) if x.dtype == jnp.float32 else x, state
    )
    one = state.rows(np.array([1]))
    again = state.with_rows(one, np.array([1]))
    jax.tree.map(np.testing.assert_array_equal, state, again)
    moved = state.with_rows(one, np.array([0])).rows(np.array([0]))
    jax.tree.map(np.testing.assert_array_equal, one, moved)
