"""What goes first: batches are filled, streams don't wait, and a program is compiled once it would have paid."""

from dataclasses import replace
from functools import partial

import pytest
import tiny
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from pool import HEADS, ONCE, SIZE, Pool, config, sequence

from jaxkv import LLM, KVCompress, Latency, Ratio, SamplingParams, Throughput
from jaxkv.engine.costs import Costs, PassShape, Work
from jaxkv.engine.decisions import Join, Wait
from jaxkv.engine.reading import shape_together
from jaxkv.engine.schedule import FEW_STEPS, STEPS
from jaxkv.generation.prefill import CHUNK
from jaxkv.requests import Finished, TextMade
from models import Llama

pytestmark = pytest.mark.once

SET_UPS = {"short": (96, 64, 64, 128), "middle": (64, 1536, 256, 256), "of the paper": (40, 6000, 500, 500)}
"""Prompts, their tokens, those of answers, and the fewest steps that 64 rows take."""
ROWS = 64


@pytest.mark.parametrize(("prompts", "tokens", "answer", "least"), SET_UPS.values(), ids=SET_UPS)
def test_rows_are_filled(prompts, tokens, answer, least):
    sizes = config(ROWS * HEADS * (6500 // SIZE), ROWS, max_context=6512)
    pool = Pool(sizes, share_prefixes=False)
    pool.run(sequence(sizes, tokens, answer, index=index) for index in range(prompts))
    assert sorted(pool.ended) == list(range(prompts))
    assert pool.steps <= 1.05 * least


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("middle", "of the paper")]


@pytest.mark.parametrize("name", ["short", *SLOW])
def test_a_models_rows_are_filled(name):
    prompts, tokens, answer, least = SET_UPS[name]
    llm = LLM(Llama(replace(tiny.CONFIG, max_context=8192), rngs=nnx.Rngs(0)), max_batch=ROWS, share_prefixes=False)
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    jobs = [(tiny.prompt(tokens, seed=seed).tolist(), params) for seed in range(prompts)]
    assert sum(isinstance(e, Finished) for e in llm.run(iter(jobs), max_context=tokens + answer)) == prompts
    assert llm.engine.decoded == prompts * (answer - 1)
    assert llm.engine.decode_steps <= 1.05 * least


def test_freed_memory_is_more_rows():
    """In a pool of two full sequences: the steps that a trace takes, by how much prompts leave."""
    steps = {}
    for policy in (None, ONCE, KVCompress(budget=Ratio(ratio=16), window=8, protected_window=8)):
        sizes = config(2 * HEADS * (512 // SIZE), 16)
        pool = Pool(sizes, share_prefixes=False)
        pool.run(sequence(sizes, 400, 40, policy, index) for index in range(16))
        assert len(pool.ended) == 16
        steps[policy] = pool.steps
    full, compressed, _ = steps.values()
    assert full >= 8 * 39
    assert compressed <= full / 1.9


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=12), rows=st.integers(1, 32))
def test_prompts_that_are_read_together_fit_their_pass(lengths, rows):
    shape = shape_together(lengths, rows)
    if shape is None:
        small = sum(lengths) <= CHUNK // 2 and max(lengths) <= 64 and len(lengths) <= min(4, rows)
        assert not small
    else:
        assert sum(lengths) <= shape.tokens <= CHUNK
        assert max(lengths) <= shape.length
        assert len(lengths) <= shape.rows <= rows


def test_prompts_of_one_policy_are_read_together_the_first_always():
    sizes = config(600, rows=6)
    pool = Pool(sizes)
    policies = [ONCE, None, ONCE, None, ONCE]
    pool.scheduler.queue.extend(sequence(sizes, 60, 30, policy, index) for index, policy in enumerate(policies))
    decision = pool.scheduler.next()
    assert [joining.sequence.index for joining in decision.prompts] == [0, 2, 4]
    assert [joining.row for joining in decision.prompts] == [0, 1, 2]
    reading = pool.scheduler.join(decision)
    assert [waiting.index for waiting in pool.scheduler.queue] == [1, 3]
    assert sorted(reading.rows) == sorted(set(reading.rows))
    assert pool.scheduler.running == []


def test_no_more_are_read_together_than_there_is_room_for():
    sizes = config(HEADS * (4 + 1 + 4 + 1), rows=6)
    pool = Pool(sizes)
    pool.scheduler.queue.extend(sequence(sizes, 60, 12, index=index) for index in range(3))
    assert len(pool.scheduler.next().prompts) == 2


def seen(**seconds):
    """Costs of steps by width (``w8``), of chunks alone (``a512``) and together (``t512``)."""
    kinds = {"w": int, "a": lambda n: PassShape(int(n)), "t": lambda n: PassShape(int(n), 8, 128)}
    return Costs(seen={Work(kinds[name[0]](name[1:])): value for name, value in seconds.items()}, compiling=1.0)


def test_what_was_not_seen_is_expected_from_the_nearest_size():
    costs = seen(w16=0.2, w4=0.1, a128=1.1)
    assert costs.of(Work(8)) == pytest.approx(0.2)
    assert costs.of(Work(32)) == pytest.approx(0.4)
    assert costs.of(Work(PassShape(512))) == pytest.approx(0.1 + 4 * 1.0), "weights are read once, however many tokens"
    assert Costs().of(Work(8)) == 0.0
    assert costs.overhead == 0.1
    costs.note(Work(4), 0.5, compiling=3.0)
    assert costs.of(Work(4)) == pytest.approx(0.2)
    assert costs.compiling == 3.0


def test_a_program_is_compiled_once_it_would_have_saved_what_that_takes():
    costs = seen(w16=0.4)
    asked = 0
    while not costs.prefers(Work(4), [Work(16)]):  # each time 0.3 s would have been saved
        asked += 1
    assert asked == 3
    costs.note(Work(4), 0.5)
    assert not costs.prefers(Work(4), [Work(16)]), "it was seen to take longer"
    assert not costs.prefers(Work(32), [Work(16)])


def test_what_has_to_be_compiled_either_way_is_what_will_cost_less():
    assert Costs().prefers(Work(PassShape(256, 4, 128)), [Work(PassShape(128))] * 2)
    costs = seen(a128=1.0)
    assert costs.prefers(Work(PassShape(256, 4, 128)), [Work(PassShape(192))] * 2)
    assert not costs.prefers(Work(PassShape(512, 8, 128)), [Work(PassShape(192))] * 2)


def test_alone_is_compiled_once_it_would_have_saved_what_that_takes():
    costs = seen(t512=4.0)
    together = Work(PassShape(512, 8, 128))
    asked = 0
    while costs.prefers(together, [Work(PassShape(224))] * 2):  # each time half a second would have been saved
        asked += 1
    assert asked == 1


def test_steps_are_as_wide_as_what_runs_or_as_what_is_compiled():
    pool = Pool(config(600, rows=12))
    work = partial(pool.scheduler.work, steps=STEPS)
    assert [work(range(n), None).size for n in (1, 2, 3, 4, 5, 7, 9, 12)] == [1, 2, 3, 4, 6, 8, 12, 12]
    pool.scheduler.costs.note(Work(8), 0.01)
    pool.scheduler.costs.compiling = 10.0
    assert [work(range(n), None).size for n in (1, 3, 8, 9)] == [8, 8, 8, 12]
    assert work(range(3), ONCE).size == 3, "another program"


@given(
    step=st.none() | st.floats(0, 1),
    chunk=st.floats(0, 1),
    soonest=st.none() | st.integers(1, 100),
    gap=st.floats(0.01, 2),
)
def test_a_dispatch_is_never_empty_and_nobody_waits_longer_than_the_gap(step, chunk, soonest, gap):
    assert FEW_STEPS <= Throughput().steps(step, chunk, soonest) <= STEPS
    steps = Latency(seconds=gap).steps(step, chunk, soonest)
    assert 1 <= steps <= STEPS
    if step is not None and steps > 1:
        assert chunk + steps * step <= gap + 1e-6


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "1"])
def test_a_gap_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match="seconds must be"):
        Latency(seconds=seconds)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule must be Throughput\(\) or Latency\(\), or None, got 'latency'"):
        LLM(tiny.MODEL, schedule="latency")


def test_prompts_wait_to_be_read_together_no_longer_than_that_saves():
    sizes = config(2000, rows=4)
    pool = Pool(sizes, costs=Costs(seen={Work(4): 0.1, Work(PassShape(256, 4, 64)): 0.1}))
    pool.scheduler.queue.extend(sequence(sizes, 60, 30 if index else 3, index=index) for index in range(4))
    pool.admit()
    pool.read()
    pool.scheduler.queue.extend(sequence(sizes, 60, 30, index=index) for index in range(4, 8))
    pool.decode()
    assert pool.scheduler.rows.count(None) == 1
    assert pool.scheduler.next() == Wait(), "three more rows would save three quarters of a pass's overhead"
    pool.scheduler.note_decoding(0.2)
    assert pool.scheduler.next() == Wait()
    pool.scheduler.note_decoding(0.2)
    assert isinstance(pool.scheduler.next(), Join)


def test_answers_are_expected_to_be_as_long_as_others_were():
    sizes = config(2000, rows=4)
    pool = Pool(sizes)
    stopping = sequence(sizes, 20, 500)
    stopping.ends = (100,)
    assert pool.scheduler.expected(stopping) == 64
    assert pool.scheduler.expected(sequence(sizes, 20, 500)) == 500
    pool.scheduler.stopped, pool.scheduler.stopped_tokens = 2, 400
    assert pool.scheduler.expected(stopping) == 200
    stopping.token_ids, stopping.replayed = [7] * 150, 150
    assert pool.scheduler.expected(stopping) == 64
    assert pool.scheduler.expected(sequence(sizes, 20, 30)) == 30


def test_nobody_who_is_answering_waits_longer_than_a_chunk_and_a_dispatch():
    """While ten long prompts arrive; counted in chunks and dispatches, for which no clock need be asked."""
    llm = LLM(tiny.MODEL, max_batch=16, schedule=Latency(), share_prefixes=False)
    first = (tiny.prompt(20).tolist(), SamplingParams(max_tokens=200, ignore_eos=True))
    others = [(tiny.prompt(500, seed).tolist(), SamplingParams(max_tokens=4)) for seed in range(10)]
    since, most, passes = 0, 0, 0
    for event in llm.run([first, *others], max_context=512):
        since += llm.engine.passes - passes
        passes = llm.engine.passes
        if isinstance(event, TextMade) and event.request == 0:
            most, since = max(most, since), 0
    assert most == 1


def test_a_prompts_last_chunk_may_be_a_shorter_one():
    sizes = config(2000, rows=1, max_context=1024)
    pool = Pool(sizes, costs=Costs(seen={Work(PassShape(512)): 0.5}, compiling=0.8))
    scheduler = pool.scheduler
    for index, expected in enumerate([512, 128]):  # it would have saved 0.375 s once, and then has paid
        scheduler.queue.append(sequence(sizes, 600, 1, index=index))
        pool.admit()
        assert scheduler.next_shape(scheduler.reading) == PassShape(512)
        pool.read()
        assert scheduler.next_shape(scheduler.reading) == PassShape(expected)
        pool.read()
    assert pool.ended == [0, 1]
