"""Suites that read piece by piece: what is read, what it holds, how likely the text is found, and what is refused."""

import numpy as np
import pytest
import tiny
from evaluate import evaluate, parse_policies, records
from evaluation.piecewise import Piecewise
from evaluation.records import Journal
from evaluation.suite import SUITES, generate
from evaluation.tasks import WHOLE, Continual, InParts, Item, OfText, Task, TaskSet
from test_evaluate import Characters

TEXT = tuple(tiny.prompt(480, 1).tolist())
EVERY = 64
RUNNER = Piecewise(tiny.MODEL, 512)


def item(reading):
    return Item(id="0", context_id="a", question=(1, 2, 3), answer=(4, 5), reading=reading)


def run(readings, policies, ratio=6.0):
    tasks = [Task(name=name, items=(item(reading),)) for name, reading in readings.items()]
    tasks.append(Task(name="text", items=(OfText(id="0", context_id="a", reading=Continual(every=EVERY)),)))
    tasks = TaskSet(contexts={"a": TEXT}, tasks=tuple(tasks))
    chosen, journal = parse_policies(policies), Journal(None, {})
    evaluate(RUNNER, tasks, chosen, [ratio], journal, None)
    return {(r.policy, r.task): r for r in records(journal, tasks, chosen, [ratio])}


@pytest.fixture(scope="module")
def full():
    return run({"whole": WHOLE, "parts": InParts(pools=3), "forced": Continual(every=EVERY)}, "none")


def test_the_full_cache_is_the_same_however_it_is_read(full):
    of_tasks = [full["none", task] for task in ("whole", "parts", "forced")]
    assert len({r.bytes_held for r in of_tasks}) == 1
    for r in of_tasks[1:]:
        assert r.nll == pytest.approx(of_tasks[0].nll, abs=0.02)  # the cache is bfloat16


def test_the_text_is_told_as_by_the_plain_model_but_for_its_first_piece(full):
    logits = tiny.dense_run(np.array(TEXT))[0].astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    wanted = -np.mean([logprobs[at - 1, TEXT[at]] for at in range(EVERY, len(TEXT))])
    assert full["none", "text"].nll == pytest.approx(wanted, abs=0.02)
    assert full["none", "text"].bytes_held == full["none", "whole"].bytes_held


def test_all_is_kept_at_eight_bits_and_little_within_a_budget(full):
    settings = "block_tokens=16:protected_window=8"
    names = "8-bit", f"leankv:{settings}", "streaming-llm:protected_window=8"
    found = run({"forced": Continual(every=EVERY), "parts": InParts(pools=3)}, ",".join(names))
    assert found["8-bit", "text"].ratio == 1
    assert found["8-bit", "text"].nll == pytest.approx(full["none", "text"].nll, abs=0.05)
    for name in names[1:]:
        for task in ("forced", "parts", "text"):
            r = found[name, task]
            assert r.bytes_full == full["none", "whole"].bytes_full
            assert 0.5 * r.bytes_full / 6 < r.bytes_held <= r.bytes_full / 6
        assert np.isfinite(found[name, "text"].nll)


def test_what_cannot_be_read_so_is_refused():
    with pytest.raises(ValueError, match="SnapKV doesn't rank what is decoded"):
        run({"forced": Continual(every=EVERY)}, "snapkv")
    with pytest.raises(ValueError, match="ratio 3 leaves no room for parts in a pool of 1/3 of the text"):
        run({"parts": InParts(pools=3)}, "knorm", ratio=3.0)


@pytest.mark.parametrize("name", ["parts", "continual"])
def test_each_part_of_a_text_has_a_word_and_a_number(name):
    suite, made = SUITES[name], generate(name, Characters())
    assert len(made.contexts) == suite.contexts
    tasks = {task.name: task.items for task in made.tasks}
    for ending, reading in suite.readings.items():
        for kind in ("words", "numbers"):
            depths = []
            for each in tasks[kind + ending]:
                text = "".join(map(chr, made.contexts[each.context_id]))
                stem = "".join(map(chr, each.question)).split("\nAnswer: ")[1]
                depths.append(text.index(stem + "".join(map(chr, each.answer))) / len(text))
                assert each.reading == reading
            parts = np.array([int(each.id.split("/")[1]) for each in tasks[kind + ending]])
            assert np.abs(np.array(depths) * suite.facts - parts - 0.5).max() < 2  # sentences are of any length
            assert (np.diff(np.reshape(depths, (suite.contexts, suite.facts))) > 0).all()
    assert ("the text" in tasks) == suite.tells
