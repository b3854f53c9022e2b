"""The scheduler's decisions, from counts alone: nothing is promised twice, the oldest goes on, every trace ends."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import AGAIN, DOCUMENT, HEADS, ONCE, SIZE, Pool, config, sequence

from jaxkv import KVCompress, LeanKV, MaxTokens
from jaxkv.cache import TierConfig
from jaxkv.engine.block_counts import BlockCounts, Blocks
from jaxkv.engine.decisions import Join, Wait
from jaxkv.engine.schedule import FEW_STEPS, STEPS, Latency, Throughput
from jaxkv.engine.scheduler import Scheduler

pytestmark = pytest.mark.once

JOB = st.tuples(
    st.integers(1, 200), st.integers(1, 60), st.sampled_from([None, ONCE, AGAIN]), st.sampled_from([0, 128, 150, 160])
)


@settings(max_examples=150)
@given(
    jobs=st.lists(JOB, min_size=1, max_size=8),
    blocks=st.integers(30, 160),
    rows=st.integers(1, 5),
    share=st.booleans(),
    schedule=st.sampled_from([Throughput(), Latency()]),
)
def test_every_trace_ends_and_nothing_is_promised_twice(jobs, blocks, rows, share, schedule):
    sizes = config(blocks, rows)
    pool = Pool(sizes, share_prefixes=share, schedule=schedule)
    pool.run(
        sequence(sizes, length, tokens, policy, index, DOCUMENT[:begins])
        for index, (length, tokens, policy, begins) in enumerate(jobs)
    )
    assert sorted(pool.ended + pool.refused) == list(range(len(jobs)))
    pool.cut(pool.scheduler.prefixes.unused())
    assert pool.counts.free == pool.counts.total


def test_the_pool_does_run_dry_and_the_youngest_is_put_back(monkeypatch):
    monkeypatch.setattr(Scheduler, "expected", lambda self, sequence: 1)
    sizes = config(44)
    pool = Pool(sizes)
    pool.run(sequence(sizes, 60, 50, index=i) for i in range(3))
    assert pool.scheduler.preemptions > 0
    assert pool.ended[0] == 0
    assert sorted(pool.ended) == [0, 1, 2]


def joined(pool, *sequences):
    """Reads these prompts one after the other."""
    for one in sequences:
        pool.scheduler.queue.append(one)
        pool.admit()
        while pool.scheduler.reading is not None:
            pool.read()


def test_a_request_waits_until_it_fits_beside_what_the_others_soon_need():
    tokens = 100 + (-100 % SIZE)
    grows = HEADS * tokens // SIZE
    for spare, decision in ((-1, Wait), (0, Join)):
        sizes = config(2 * (HEADS * 2 + grows) + spare)
        pool = Pool(sizes)
        joined(pool, sequence(sizes, 2 * SIZE, 100))
        pool.scheduler.queue.append(sequence(sizes, 2 * SIZE, 100, index=1))
        assert isinstance(pool.scheduler.next(), decision)


def test_a_decision_changes_nothing():
    sizes = config(200)
    scheduler = Scheduler(sizes)
    scheduler.queue.extend(sequence(sizes, 20, index=i, begins=DOCUMENT) for i in range(2))
    first, again = scheduler.next(), scheduler.next()
    assert first == again
    [joining] = first.prompts
    assert (joining.row, joining.share.lend_tokens) == (0, 160)
    assert scheduler.rows == [None] * 3
    assert len(scheduler.queue) == 2


def test_one_prompt_is_read_at_a_time_and_nobody_joins_full_rows():
    sizes = config(200, rows=1)
    pool = Pool(sizes)
    pool.scheduler.queue.extend(sequence(sizes, 20, index=i) for i in range(2))
    pool.admit()
    assert pool.scheduler.next() == Wait()
    pool.read()
    assert pool.scheduler.reading is None
    assert pool.scheduler.next() == Wait()


def test_what_can_never_be_served_is_refused_in_its_turn():
    sizes = config(20)
    scheduler = Scheduler(sizes)
    scheduler.queue.append(sequence(sizes, 200, index=3))
    refused = scheduler.next()
    assert refused.request == 3
    assert "the prompt has 200 tokens and needs 56 blocks with its answer, but the pool has 20" in refused.error


def test_after_a_preemption_nobody_joins_until_somebody_leaves():
    sizes = config(200)
    pool = Pool(sizes)
    joined(pool, sequence(sizes, 20), sequence(sizes, 20, index=1))
    pool.scheduler.put_back(pool.scheduler.whom_to_put_back())
    assert pool.scheduler.queue[0].index == 1
    assert pool.scheduler.next() == Wait()
    pool.leave(0)
    assert isinstance(pool.scheduler.next(), Join)


def test_unused_prefixes_go_where_one_would_have_to_wait():
    sizes = config(120)
    pool = Pool(sizes)
    scheduler = pool.scheduler
    scheduler.queue.extend(sequence(sizes, 5, 1, index=i, begins=DOCUMENT) for i in range(2))
    pool.admit()
    while scheduler.reading is not None:
        pool.read()
    assert [shared.blocks for shared in scheduler.prefixes] == [10]
    decision = scheduler.next()
    [borrowing] = decision.prompts
    assert (borrowing.share.borrow_tokens, borrowing.takes, decision.cut) == (160, Blocks(raw=HEADS), ())
    scheduler.queue.clear()
    scheduler.queue.append(sequence(sizes, 400, index=2))
    [shared] = scheduler.prefixes
    assert scheduler.next().cut == (shared,)


def test_fewer_steps_where_the_pool_serves_no_more():
    sizes = config(HEADS * 8)
    pool = Pool(sizes)
    joined(pool, sequence(sizes, 20, 100))  # 12 more fit into its last blocks
    assert pool.scheduler.steps() == STEPS
    pool.counts.free = Blocks(raw=HEADS - 1)
    assert pool.scheduler.steps() == STEPS // 2
    pool.grow(0, 12)
    pool.counts.free = Blocks(raw=HEADS - 1)
    assert pool.scheduler.steps() == 0


def test_few_steps_while_a_prompt_is_read():
    sizes = config(200)
    for schedule, steps in ((Latency(), FEW_STEPS), (Throughput(), STEPS)):
        pool = Pool(sizes, schedule=schedule)
        joined(pool, sequence(sizes, 20, 100))
        pool.scheduler.queue.append(sequence(sizes, 20, index=1))
        pool.admit()
        assert pool.scheduler.steps() == steps


def test_rows_whose_policies_do_nothing_in_decoding_go_together():
    sizes = config(400, rows=4)
    pool = Pool(sizes)
    policies = [None, ONCE, AGAIN, None]
    joined(pool, *(sequence(sizes, 60, 30, policy, index) for index, policy in enumerate(policies)))
    assert list(pool.scheduler.dispatches()) == [(None, [0, 1, 3]), (AGAIN, [2])]
    assert pool.scheduler.whom_to_compress_again() == [2]


def read_and_compressed(sizes, policy):
    scheduler = Scheduler(sizes)
    scheduler.queue.append(sequence(sizes, 20, 200, policy))
    scheduler.join(scheduler.next())
    scheduler.reading = None
    return scheduler, scheduler.counts


def test_an_answer_that_outgrows_its_pool_is_refused():
    scheduler, counts = read_and_compressed(config(100), None)
    assert scheduler.too_large(0) is None
    counts.raw_lengths[:, 0] = 400
    assert "the prompt holds 100 blocks once it is read, but 200 more tokens may need 52" in scheduler.too_large(0)


def test_an_answer_that_is_compressed_again_may_be_longer_than_its_pool():
    policy = KVCompress(budget=MaxTokens(tokens=32), protected_window=8, compress_every=40)
    scheduler, counts = read_and_compressed(config(100), policy)
    counts.raw_lengths[:, 0] = 20  # of the prompt
    scheduler.sequence(0).request = replace(scheduler.sequence(0).request, limit=100_000)
    assert scheduler.too_large(0) is None
    counts.total = Blocks(raw=HEADS * 4)
    said = f"the prompt holds {HEADS * 2} blocks whenever it is compressed, but 40 more tokens may need {HEADS * 3}"
    assert said in scheduler.too_large(0)


def test_an_answer_that_outgrows_its_quantised_pool_is_refused():
    layout = LeanKV().placement.layout(16)
    tiers = TierConfig(layout=layout, num_blocks=21)
    scheduler, counts = read_and_compressed(config(100, tiers=tiers), LeanKV())
    assert scheduler.too_large(0) is None
    counts.quantised_lengths[:, 0] = 64
    assert "the prompt holds 8 blocks once it is read, but 200 more" in scheduler.too_large(0)
    counts.raw_lengths[:, 0] = 1
    assert "the prompt doesn't fit its 20 quantised blocks" in scheduler.too_large(0)


BLOCKS = st.builds(Blocks, raw=st.integers(0, 50), quantised=st.integers(0, 50))


@given(a=BLOCKS, b=BLOCKS)
def test_blocks_fit_where_both_kinds_do(a, b):
    assert (a + b) - b == a
    assert a <= a + b
    assert (a <= b) == (a.raw <= b.raw and a.quantised <= b.quantised)


@given(length=st.integers(0, 200), tokens=st.integers(0, 100))
def test_growth_is_what_so_many_more_tokens_allocate(length, tokens):
    counts = BlockCounts(config(400))
    counts.raw_lengths[:, 1] = length
    before, more = counts.held(1), counts.growth([1], [ONCE], [tokens])
    counts.raw_lengths[:, 1] += tokens
    assert before + more == counts.held(1) == Blocks(raw=HEADS * -(-(length + tokens) // SIZE))


@given(
    high=st.integers(0, 9),
    low=st.integers(0, 9),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    tokens=st.integers(0, 9),
)
def test_growth_of_tiers_is_the_worst_that_tokens_can_do(high, low, sizes, tokens):
    layout = LeanKV().placement.layout(16)
    counts = BlockCounts(config(400, tiers=TierConfig(layout=layout, num_blocks=100)))
    counts.quantised_kvs = np.array(sizes)
    counts.quantised_lengths[:, 1] = high, low
    held, worst = counts.held(1), counts.growth([1], [LeanKV()], [tokens])
    grown = []
    for more in range(tokens + 1):
        counts.quantised_lengths[:, 1] = high + more, low + tokens - more
        grown.append(counts.held(1).quantised)
    assert (held + worst).quantised == max(grown)


@pytest.mark.parametrize(("total", "part"), [(500, 64), (130, 128), (64, 64), (1, 64)])
def test_chunks_cover_a_prompt_part_by_part(total, part):
    pool = Pool(config(400))
    pool.scheduler.queue.append(sequence(pool.config, total))
    reading = pool.scheduler.join(pool.scheduler.next())
    [prompt] = reading.prompts
    prompt.part, ends, seen = part, [], []
    while prompt.read < total:
        tokens, [count] = reading.next_chunk(reading.shape)
        seen.extend(tokens[0, :count])
        prompt.read += count
        if prompt.part_is_read:
            ends.append(prompt.read)
            again = [t for _, tokens, [count] in reading.part_again() for t in tokens[0, :count]]
            assert again == seen[(len(ends) - 1) * part :]
    assert seen == prompt.ids.tolist()
    assert ends == [*range(part, total, part), total]
