"""scripts/evaluate.py: what counts as right, bytes that fit, files that are wrong, runs that go on."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from evaluate import evaluate, main, parse_policies, records
from evaluation.records import Journal, table, wilson
from evaluation.scoring import Runner
from evaluation.suite import generate
from evaluation.tasks import Item, Task, TaskSet, read_tasks

from jaxkv import Ratio
from jaxkv.compression.shares import Global
from jaxkv.policies import Auto, KNorm, KVzip

CONTEXTS = {"a": tuple(tiny.prompt(400, 1).tolist()), "b": tuple(tiny.prompt(333, 2).tolist())}
RUNNER = Runner(tiny.MODEL, 512)


def item(number, context, told=()):
    """Its answer is what the plain model says, but for every third, of which the last token is another."""
    question = tuple(tiny.prompt(5 + number, 10 + number).tolist())
    answer = tiny.dense_greedy(np.array([*CONTEXTS[context], *told, *question], np.int32), 3)
    if number % 3 == 2:
        answer[-1] = (answer[-1] + 1) % 100
    return Item(id=str(number), context_id=context, question=question, answer=tuple(answer), told=told)


TASKS = TaskSet(
    contexts=CONTEXTS,
    tasks=(
        Task(name="after", items=tuple(item(i, "ab"[i % 2]) for i in range(4))),
        Task(name="before", items=(item(4, "a", tuple(tiny.prompt(9, 3).tolist())),)),
    ),
)


def run(path, policies="none,kvzip", ratios=(3.0, 6.0)):
    chosen = parse_policies(policies)
    journal = Journal(path and path.with_name("items.jsonl"), {"model": "tiny"})
    evaluate(RUNNER, TASKS, chosen, list(ratios), journal, path)
    return records(journal, TASKS, chosen, list(ratios))


def test_the_full_cache_is_right_where_the_model_is():
    after, before = run(None, "none")
    assert (after.task, after.accuracy, after.n) == ("after", 0.75, 4)
    assert after.token_accuracy == pytest.approx(11 / 12)
    assert (before.task, before.accuracy, before.ratio) == ("before", 1.0, 1.0)
    item = TASKS.tasks[1].items[0]
    tokens = np.array([*CONTEXTS["a"], *item.told, *item.question, *item.answer])
    logits = tiny.dense_run(tokens)[0][-4:-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert before.nll == pytest.approx(-logprobs[range(3), item.answer].mean(), abs=0.05)  # the cache is bfloat16


def test_what_quantised_tiers_hold_fits_in_the_ratio():
    found = run(None, "leankv,mixed:block_tokens=32:high=K4V4:low=K4V2:high_share=0.0")
    assert {r.ratio for r in found} == {3, 6}
    for r in found:
        assert 0.75 * r.bytes_full / r.ratio < r.bytes_held <= r.bytes_full / r.ratio


def test_what_is_held_fits_in_the_ratio_and_a_run_goes_on(tmp_path):
    found = run(tmp_path / "out.json")
    assert [(r.policy, r.ratio, r.task) for r in found] == [
        (policy, ratio, task)
        for policy, ratios in (("none", (1,)), ("kvzip", (3, 6)))
        for ratio in ratios
        for task in ("after", "before")
    ]
    for r in found:
        if r.policy != "none":
            assert 0.85 * r.bytes_full / r.ratio < r.bytes_held <= r.bytes_full / r.ratio
    assert [r["accuracy"] for r in json.loads((tmp_path / "out.json").read_text())] == [r.accuracy for r in found]
    assert "| before | kvzip | 6 |" in table(found)

    journal = tmp_path / "items.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:5]) + lines[5][:20])  # killed while it wrote
    again = run(tmp_path / "out.json")
    assert [(r.policy, r.ratio, r.task, r.accuracy) for r in again] == [
        (r.policy, r.ratio, r.task, r.accuracy) for r in found
    ]
    assert [r.nll for r in again] == pytest.approx([r.nll for r in found], rel=1e-5)  # a busy machine sums otherwise
    assert journal.read_text().splitlines(keepends=True)[:5] == lines[:5]
    with pytest.raises(ValueError, match="other model"):
        Journal(journal, {"model": "another"})


def test_a_ratio_that_cannot_be_held_is_an_error():
    with pytest.raises(ValueError, match=r"ratio 60 leaves room for"):
        run(None, "snapkv", (60.0,))


GOOD = [{"id": 1, "context_id": "a", "question_ids": [1, 2], "answer_ids": [3]}]
BAD = {
    "not JSON": ("{", "is not JSON"),
    "no list": ("{}", "list of objects"),
    "no object": ("[3]", "entry 0: must be an object"),
    "no id": ([{**GOOD[0], "id": None}], "entry 0 needs 'id'"),
    "twice": (GOOD * 2, "entry 1: id '1' is there twice"),
    "no context": ([{**GOOD[0], "context_id": "z"}], "'z' is none of"),
    "no answer": ([{k: v for k, v in GOOD[0].items() if k != "answer_ids"}], "needs one of 'answer' and 'answer_ids'"),
    "both": ([{**GOOD[0], "question": "?"}], "needs one of 'question'"),
    "no token": ([{**GOOD[0], "answer_ids": []}], "'answer_ids' holds no token"),
    "out of range": ([{**GOOD[0], "answer_ids": [101]}], "token ids from 0 to 100"),
    "text without tokenizer": ([{"id": 1, "context_id": "a", "question": "?", "answer_ids": [1]}], "no tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_task_file_is_named(tmp_path, name):
    content, said = BAD[name]
    (tmp_path / "contexts.json").write_text(json.dumps([{"id": "a", "context_ids": [1, 2, 3]}]))
    (tmp_path / "facts.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=said) as caught:
        read_tasks(tmp_path, None, 101)
    assert "facts.json" in str(caught.value)


def test_tasks_of_a_directory(tmp_path):
    with pytest.raises(ValueError, match=r"no contexts\.json"):
        read_tasks(tmp_path, None, 101)
    (tmp_path / "contexts.json").write_text(json.dumps([{"id": "a", "context_ids": [1, 2, 3]}]))
    with pytest.raises(ValueError, match="has no tasks"):
        read_tasks(tmp_path, None, 101)
    (tmp_path / "facts.json").write_text(json.dumps(GOOD))
    assert read_tasks(tmp_path, None, 101) == TaskSet(
        contexts={"a": (1, 2, 3)},
        tasks=(Task(name="facts", items=(Item(id="1", context_id="a", question=(1, 2), answer=(3,)),)),),
    )


def test_some_tasks_alone():
    whole = generate("quick", Characters(), 0)
    assert [task.name for task in whole.only(["numbers", "copying"], None).tasks] == ["numbers", "copying"]
    assert whole.only(None, None) == whole.only(None, 3) == whole
    first = whole.only(None, 1)
    assert list(first.contexts) == ["0"]
    assert [len(task.items) * 3 for task in first.tasks] == [len(task.items) for task in whole.tasks]
    for names, contexts, said in (
        (["words", "letters"], None, "--only: no task is named 'letters'; there are words; "),
        (None, 0, "--contexts must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            whole.only(names, contexts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--policies", "snapvk"), "no policy is named 'snapvk'"),
        (("--policies", "kvzip:power=many"), "'many' is neither a number nor one of l1, "),
        (("--policies", "kvzip:strength=2"), "policy kvzip has no strength"),
        (("--policies", "mixed:high=K3V4"), "key_bits must be one of"),
        (("--ratios", "4,x"), "numbers above 1"),
        (("--ratios", "1"), "numbers above 1"),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(capsys, options, said):
    assert main(["--model", "nowhere", "--suite", "quick", *options]) == 2
    assert said in capsys.readouterr().err


def test_the_interval_of_an_accuracy():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1


def test_policies_take_settings():
    found = parse_policies("none,kvzip:power=2:group=mean,knorm:shares=global,auto:reread=false")
    assert list(found) == ["none", "kvzip:power=2:group=mean", "knorm:shares=global", "auto:reread=false"]
    assert found["none"] is None
    assert found["kvzip:power=2:group=mean"] == KVzip(budget=Ratio(ratio=2), power=2, group=jnp.mean)
    assert found["knorm:shares=global"] == KNorm(budget=Ratio(ratio=2), shares=Global())
    assert found["auto:reread=false"] == Auto(budget=Ratio(ratio=2), reread=False)


def test_a_suite_follows_from_its_seeds():
    """A tokenizer of one token a character is enough to see texts."""
    made = [generate("quick", Characters(), seed) for seed in (0, 0, 5)]
    assert made[0] == made[1] != made[2]
    texts = {key: "".join(map(chr, ids)) for key, ids in made[0].contexts.items()}
    for task in made[0].tasks:
        for item in task.items:
            answer = "".join(map(chr, item.answer))
            if task.name != "continuation":
                assert answer in texts[item.context_id]


class Characters:
    chat_template = None

    def encode(self, text, *, add_special=True):
        return [ord(c) for c in text]
