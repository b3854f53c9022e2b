"""LongBench and RULER: their files as published, their prompts cut and split, answers written, metrics by hand."""

import json

import numpy as np
import pytest
import tiny
from evaluate import evaluate, main, parse_policies, records
from evaluation import longbench, metrics
from evaluation.benchmark import Protocol, read_benchmark
from evaluation.records import Journal, read_json, table
from evaluation.scoring import Runner
from evaluation.tasks import Item, Task, TaskSet, Written
from evaluation.writing import Writer

from jaxkv.policies import Ratio, make_policy


class Characters:
    """A token a character, and one at the beginning."""

    eos_ids = (100,)

    def encode(self, text, *, add_special=True):
        return [96] * add_special + [95 if c == "\n" else ord(c) % 95 for c in text]

    def decode(self, ids):
        return "".join("\n" if i == 95 else chr(i if i >= 32 else i + 95) for i in ids if i < 96)

    def chat(self, messages):
        [message] = messages
        return f"<user>{message['content']}</user>"

    def encode_chat(self, text):
        return self.encode(text, add_special=False)


TOKENIZER = Characters()


def write(directory, name, rows):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sample(**fields):
    """A line of LongBench's."""
    common = {"dataset": "x", "language": "en", "_id": "1", "length": 9, "all_classes": None, "answers": ["yes"]}
    return {**common, "input": "Who?", "context": "Some text.", **fields}


def needle(**fields):
    """A line of RULER's niah tasks."""
    text = "A special magic number is hidden.\nOne of it is 7.\nWhat is the special magic number for it?"
    return {"index": 0, "input": text, "outputs": ["7"], "length": 60, "answer_prefix": " It is", **fields}


def read(directory, max_context=4000, **protocol):
    return read_benchmark(directory, TOKENIZER, max_context, Protocol(**protocol))


def prompt_of(tasks, number=0):
    """An item's context and question as text."""
    item = tasks.tasks[number].items[0]
    return TOKENIZER.decode(tasks.contexts[item.context_id]), TOKENIZER.decode(item.question)


def test_a_prompt_is_split_behind_its_context(tmp_path):
    write(tmp_path, "hotpotqa.jsonl", [sample(), sample(input="When?")])
    tasks = read(tmp_path)
    before, after = prompt_of(tasks)
    assert before.startswith("Answer the question based on the given passages.")
    assert before.endswith("The following are given passages.\nSome text.")
    assert after.startswith("\n\nAnswer the question based")
    assert after.endswith("\n\nQuestion: Who?\nAnswer:")
    [task] = tasks.tasks
    assert [item.context_id for item in task.items] == ["hotpotqa/1"] * 2  # the same context is read once
    assert (task.name, task.items[0].metric, task.items[0].most_tokens) == ("hotpotqa", "qa_f1", 32)

    whole, last = prompt_of(read(tmp_path, aware=True))
    assert whole + last == before + after
    assert last == ":"


def test_chat_goes_around_the_prompt_but_not_around_examples(tmp_path):
    write(tmp_path, "qasper.jsonl", [sample()])
    write(tmp_path, "triviaqa.jsonl", [sample()])
    tasks = read(tmp_path, chat=True)
    (before, after), (plain, _) = prompt_of(tasks), prompt_of(tasks, 1)
    assert before.startswith("<user>You are given a scientific article")
    assert after.endswith("Question: Who?\n\nAnswer:</user>")
    assert not plain.startswith("<user>")
    assert tasks.tasks[1].items[0].first_line


def test_a_long_prompt_loses_its_middle(tmp_path):
    write(tmp_path, "hotpotqa.jsonl", [sample(context="0123456789" * 100)])
    whole = "".join(prompt_of(read(tmp_path)))
    for longest, options in ((501, {"max_length": 501}), (768, {"max_context": 800})):  # 32 are the answer's
        for aware in (False, True):
            tasks = read(tmp_path, **options, aware=aware)
            item = tasks.tasks[0].items[0]
            half = longest // 2
            assert len(tasks.contexts[item.context_id]) + len(item.question) == 2 * half
            assert "".join(prompt_of(tasks)) == whole[: half - 1] + whole[-half:]  # one token has no text
    with pytest.raises(ValueError, match=r"hotpotqa, line 1: .* don't fit in half of 100"):
        read(tmp_path, max_length=100)


def test_longbench_e_is_reported_by_length(tmp_path):
    write(tmp_path, "samsum_e.jsonl", [sample(length=n, context=str(n)) for n in (8000, 3999, 4000, 7999)])
    tasks = read(tmp_path)
    assert {task.name: len(task.items) for task in tasks.tasks} == {
        "samsum_e, 8k+": 1,
        "samsum_e, 0-4k": 1,
        "samsum_e, 4-8k": 2,
    }
    assert all(item.ends_line and item.first_line for task in tasks.tasks for item in task.items)
    assert len(read(tmp_path, limit=1).tasks) == 1


def test_every_longbench_task_can_be_read(tmp_path):
    for name in longbench.protocol():
        write(tmp_path, f"{name}.jsonl", [sample(answers=["Paragraph 3"], all_classes=["Paragraph 3", "a"])])
    tasks = read(tmp_path)
    assert len(tasks.tasks) == 21
    for task in tasks.tasks:
        [item] = task.items
        assert metrics.score(item, "Paragraph 3") == pytest.approx(float(item.metric != "count"), abs=1e-6)
        assert not {"{context}", "{input}"} & {*"".join(prompt_of(tasks, tasks.tasks.index(task))).split()}


RULER = {
    "niah_multikey_1": needle(outputs=["7", "8"]),
    "vt": needle(input="Memorize X.\nQuestion: Find all variables that are assigned the value 7 in the text above."),
    "cwe": needle(input="".join(f"{i}\nQuestion: What are the 10 most common words in the above list?" for i in "12")),
    "fwe": needle(input="Read. a b\nQuestion: Do not provide any explanation. Please ignore the dots '....'."),
    "qa_1": needle(
        input="Answer the question based on the given documents. D1 "
        "Answer the question based on the given documents.\n\nQuestion: Who?",
        outputs=["7", "8"],
    ),
}
BEFORE = {"niah_multikey_1": "is 7.\n", "vt": "X.\n", "cwe": "list?2\n", "fwe": "a b\n", "qa_1": "D1 "}


def test_ruler_is_split_at_its_questions(tmp_path):
    for name, row in RULER.items():
        write(tmp_path, f"{name}/validation.jsonl", [row])
    write(tmp_path, "vt/test.jsonl", [needle(input="nothing")])
    tasks, chat = read(tmp_path), read(tmp_path, chat=True)
    assert {
        task.name: (task.items[0].most_tokens, metrics.score(task.items[0], "it's 7\t.")) for task in tasks.tasks
    } == {
        "niah_multikey_1": (128, 0.5),
        "vt": (30, 1.0),
        "cwe": (120, 1.0),
        "fwe": (50, 1.0),
        "qa_1": (32, 1.0),
    }
    for i, task in enumerate(tasks.tasks):
        before, after = prompt_of(tasks, i)
        assert before.endswith(BEFORE[task.name])
        assert before + after == RULER[task.name]["input"] + " It is"
        assert prompt_of(chat, i) == (f"<user>{before}", after.removesuffix(" It is") + "</user> It is")


WRONG = {
    "unknown": ("qasper2.jsonl", sample(), "LongBench has no task 'qasper2'"),
    "not text": ("qasper.jsonl", sample(context=3), "line 1 needs 'context', a string"),
    "no answers": ("qasper.jsonl", sample(answers=[]), "needs 'answers', a list of at least one string"),
    "no classes": ("trec.jsonl", sample(), "needs 'all_classes'"),
    "no length": ("qasper_e.jsonl", sample(length=None), "needs 'length'"),
    "unknown of RULER": ("hop/validation.jsonl", needle(), "RULER has no task 'hop'"),
    "no question": ("vt/test.jsonl", needle(), "'input' has no question of a vt task"),
    "too long": ("niah_single_1/test.jsonl", needle(input=needle()["input"] * 50), "room for 3872 before the answer"),
    "nothing": ("qasper.json", sample(), "neither LongBench's TASK.jsonl nor RULER's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_not_as_published_is_named(tmp_path, name):
    path, row, said = WRONG[name]
    write(tmp_path, path, [row])
    with pytest.raises(ValueError, match=said):
        read(tmp_path)


def test_what_else_can_be_wrong(tmp_path, monkeypatch, capsys):
    old = {k: v for k, v in needle().items() if k != "answer_prefix"}
    write(tmp_path, "niah_single_1/validation.jsonl", [old])
    assert prompt_of(read(tmp_path))[1] == "What is the special magic number for it?"
    with pytest.raises(ValueError, match="leave --chat out"):
        read(tmp_path, chat=True)
    (tmp_path / "vcsum.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read(tmp_path)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"task vcsum is scored with rouge and jieba: pip install -e '.\[benchmarks\]'"
    ):
        read(tmp_path)
    for options, said in (
        (("--suite", "quick", "--chat"), "--chat is of --benchmark"),
        (("--benchmark", "x", "--limit", "0"), "--limit must be at least 1, got 0"),
    ):
        assert main(["--model", "nowhere", *options]) == 2
        assert said in capsys.readouterr().err


def scored(metric, said, *references, **fields):
    common = {"id": "1", "context_id": "c", "question": (1,), "most_tokens": 9}
    return metrics.score(Written(metric=metric, references=references, **common, **fields), said)


LINES = "# import\n`x`\nreturn a+b\nmore"
NEWS = ("体育", "体育新闻", "财经")
BY_HAND = [
    ("qa_f1", "The cat, sat.", "a cat sat down", 4 / 5),  # 2 of 2 words, 2 of 3
    ("qa_f1", "the", "The", 0.0),
    ("count", "3 of 4, or 3", "3", 2 / 3),
    ("count", "none", "3", 0.0),
    ("retrieval", "Paragraph 12, or 3", "Paragraph 12", 1 / 2),
    ("retrieval", "段落3", "段落3", 1.0),
    ("code", LINES, "return a+b", 1.0),
    ("code", LINES, "return a-b", 0.9),
    ("code", "# nothing", "x", 0.0),
    ("contains", " It IS\x07Seven ", "is\nseven", 1.0),
    ("rouge", "the cat sat", "the cat ran away", 4 / 7),  # 2 of 3 words, 2 of 4
    ("rouge", "", "x", 0.0),
    ("qa_f1_zh", "我们。今天。", "我们 明天", 1 / 2),
    ("rouge_zh", "我们今天", "我们明天", 1 / 2),
]


@pytest.mark.parametrize(("metric", "said", "reference", "value"), BY_HAND)
def test_a_metric_is_what_it_is_by_hand(metric, said, reference, value):
    assert scored(metric, said, reference) == pytest.approx(value, abs=1e-6)


def test_how_scores_of_references_and_lines_are_joined():
    assert scored("qa_f1", "x", "y", "x") == 1.0
    assert scored("contains", "x z", "y", "x", every=True) == 0.5
    assert scored("contains", "x z", "y", "x") == 1.0
    assert scored("qa_f1", "\n\nx\ny", "x", first_line=True) == 1.0
    assert scored("classification", "体育新闻", "体育新闻", classes=NEWS) == 1.0  # a part of its name doesn't count
    assert scored("classification", "体育新闻", "体育", classes=NEWS) == 0.5
    assert scored("classification", "x", "体育", classes=NEWS) == 0.0
    assert scored("classification", "abc", "abc", classes=("a", "b", "abc")) == 0.5  # as published: b is passed over


CONTEXT = tuple(tiny.prompt(300, 1).tolist())


def written(number, question, **fields):
    common = {"references": ("",), "metric": "contains", "most_tokens": 8}
    return Written(id=str(number), context_id="c", question=tuple(question), **{**common, **fields})


def set_of(*items):
    return TaskSet(contexts={"c": CONTEXT}, tasks=(Task(name="t", items=items),))


def test_what_is_written_is_what_the_model_says():
    question = tiny.prompt(140, 3).tolist()
    plain = tiny.dense_greedy(np.array([*CONTEXT, *question], np.int32), 8)
    item, line = written(1, question), written(2, question, ends_line=True)
    writer = Writer(tiny.MODEL, set_of(item, line), TOKENIZER)
    cache, _ = writer.scored(writer.read(CONTEXT, None), (), None)
    assert writer.stops == {100}
    assert writer.write(cache, item) == plain
    assert writer.ask(cache, [item], read=0, compress=0)[0].said == TOKENIZER.decode(plain)
    writer.stops.add(plain[4])
    assert writer.write(cache, item) == plain[: plain.index(plain[4])]
    writer.stops.add(plain[0])
    assert writer.write(cache, item) == []
    said = writer.write(cache, line)  # here, what ends an answer can't begin it
    assert said
    assert not {*said} & {*writer.stops, 95}


@pytest.mark.parametrize("name", ["knorm", "mixed"])
def test_what_is_written_after_compression_is_what_the_cache_says(name):
    """All at once through the same cache, question and answer give each of its tokens the highest probability."""
    question = tiny.prompt(20, 4).tolist()
    policy = make_policy(name, Ratio(ratio=2), **({"block_tokens": 32} if name == "mixed" else {}))
    item = written(1, question)
    writer = Writer(tiny.MODEL, set_of(item), TOKENIZER)
    full, _ = writer.scored(writer.read(CONTEXT, policy), (), policy)
    small, _ = writer.shrunk(full, policy, 3.0)
    writer.stops = set()
    said = writer.write(small, item)
    again = Item(id="1", context_id="c", question=tuple(question), answer=tuple(said))
    [outcome] = Runner.ask(writer, small, [again], read=0, compress=0)
    assert len(said) == 8
    assert outcome.correct
    assert writer.write(small, item) == said  # the cache is as it was


def test_a_benchmark_runs_and_goes_on(tmp_path):
    right = TOKENIZER.decode(tiny.dense_greedy(np.array([*CONTEXT, 5, 6], np.int32), 8))
    tasks = set_of(written(1, (5, 6), references=(right,)), written(2, (5, 6), references=(right, "\0"), every=True))
    chosen = parse_policies("none,knorm")
    for _ in range(2):
        journal = Journal(tmp_path / "items.jsonl", {})
        evaluate(Writer(tiny.MODEL, tasks, TOKENIZER), tasks, chosen, [3.0], journal, tmp_path / "out.json")
        full, small = records(journal, tasks, chosen, [3.0])
        assert (full.policy, full.accuracy, full.n, full.nll, full.token_accuracy) == ("none", 0.75, 2, None, None)
        assert small.bytes_held <= small.bytes_full / 3
    assert read_json(tmp_path / "out.json") == [full, small]
    assert "| t | none | 1 | 0.750 |" in table([full, small])
    assert journal.outcomes["none", 1.0, "t"]["1"].said == right
