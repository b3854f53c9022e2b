"""The built-in tasks, over contexts of real prose; the same seeds give the same tasks."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from evaluation.prose import CITIES, number_fact, passage, plant, word_fact
from evaluation.tasks import WHOLE, Continual, InParts, Item, OfText, Reading, Task, TaskSet
from models import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Sizes of a suite."""

    contexts: int
    words: int
    """Of prose a context; a word is 1.35 tokens."""
    facts: int
    """Planted of each kind in a context."""
    aware: int
    """Of them also asked for in the prompt."""


@dataclass(frozen=True, kw_only=True)
class Depths:
    """Sizes of a suite of facts alone: in each of equal parts of a text one with a word, and one with a number."""

    contexts: int
    words: int
    """As of ``Suite``."""
    facts: int
    """Parts of the text."""
    readings: Mapping[str, Reading] = field(default_factory=dict)
    """What a task's name ends with, and how its contexts are read."""
    tells: bool = False
    """Whether how likely the text itself is found is a task, too."""


SUITES: dict[str, Suite | Depths] = {
    "quick": Suite(contexts=3, words=1250, facts=4, aware=1),
    "full": Suite(contexts=24, words=1250, facts=4, aware=2),
    "long": Suite(contexts=12, words=5450, facts=4, aware=0),
    "parts": Depths(contexts=12, words=1500, facts=8, readings={"": WHOLE, ", in parts": InParts(pools=3)}),
    "continual": Depths(contexts=12, words=1500, facts=10, readings={"": Continual(every=128)}, tells=True),
}
INSTRUCTION = (
    "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any "
    "other words."
)
"""What LongBench's MultiFieldQA has between context and question."""
BEGUN = {"words": {"answer begun": 0}, "numbers": {"answer begun": 1, "digit given": 2}}
"""Tokens of the answer that are given, of which the last is read after compression."""


def generate(name: str, tokenizer: Tokenizer, first_seed: int = 0) -> TaskSet:
    """The tasks of a suite: words, numbers, and both with the question in the prompt; copying, continuing, turns. Of
    ``parts`` and ``continual`` words and numbers alone.

    Asked before: the prompt ends with the question. Answer begun: with the answer's beginning, too; a number's first
    token, the space, is given, which ``generate`` takes from the full cache. Digit given: its first digit, too. As in
    LongBench: the prompt ends with "Answer:", and its instruction stands before the question. In chat: it ends with
    what the model's chat format, where it has one, puts behind the question.
    """
    suite = SUITES[name]
    contexts: dict[str, tuple[int, ...]] = {}
    tasks: dict[str, list[Item]] = defaultdict(list)
    for seed in range(first_seed, first_seed + suite.contexts):
        if isinstance(suite, Depths):
            _add_depths(suite, seed, tokenizer, contexts, tasks)
        else:
            _add(suite, seed, tokenizer, contexts, tasks)
    return TaskSet(contexts=contexts, tasks=tuple(Task(name=n, items=tuple(items)) for n, items in tasks.items()))


def _add(
    suite: Suite, seed: int, tokenizer: Tokenizer, contexts: dict[str, tuple[int, ...]], tasks: dict[str, list[Item]]
) -> None:
    """One context and all its items."""
    rng, key = random.Random(seed), str(seed)

    def ids(text: str, special: bool = False) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special=special))

    def add(task: str, question: str, answer: tuple[int, ...], told: str = "") -> None:
        put(task, ids(question), answer, ids(told) if told else ())

    def put(task: str, question: tuple[int, ...], answer: tuple[int, ...], told: tuple[int, ...]) -> None:
        name = f"{key}/{len(tasks[task])}"
        tasks[task].append(Item(id=name, context_id=key, question=question, answer=answer, told=told))

    cities = rng.sample(CITIES, 2 * suite.facts)
    words = [word_fact(city, rng) for city in cities[: suite.facts]]
    numbers = [number_fact(city, rng) for city in cities[suite.facts :]]
    sentences, after = passage(suite.words, rng)
    contexts[key] = ids(plant(rng.sample(words + numbers, 2 * suite.facts), sentences, rng), special=True)

    for task, facts in ("words", words), ("numbers", numbers):
        for fact in facts:
            add(task, fact.question + fact.stem, ids(fact.answer))
        for fact in facts[: suite.aware]:
            answer, instructed = ids(fact.answer), f"{INSTRUCTION}{fact.question}\nAnswer:"
            add(f"{task}, asked before", fact.stem, answer, told=fact.question)
            add(f"{task}, as in LongBench", fact.stem.removeprefix("\nAnswer:"), answer, told=instructed)
            if tokenizer.chat_template is not None:
                closing = tokenizer.chat([{"role": "user", "content": fact.question}]).split(fact.question.strip())[-1]
                told = ids(fact.question) + ids(closing)
                put(f"{task}, in chat", ids(fact.stem.removeprefix("\nAnswer: ")), answer, told)
            for what, given in BEGUN[task].items():
                begun = ids(fact.question + fact.stem) + answer[:given]
                put(f"{task}, {what}", begun[-1:], answer[given:], begun[:-1])
    first, second = words[:2]
    turn = first.question + first.stem + first.answer + "."
    add("words, second turn", turn + second.question + second.stem, ids(second.answer))
    long = [s for s in sentences if len(s.split()) > 24]
    for sentence in rng.sample(long, 2):
        start = " ".join(sentence.split()[:10])
        add("copying", f"\n\nAs it was said before: {start}", ids(sentence[len(start) :])[:8])
    head, tail = after[:40].rsplit(" ", 1)
    add("continuation", f" {head}", ids(f" {tail}{after[40:]}")[:128])


def _add_depths(
    suite: Depths, seed: int, tokenizer: Tokenizer, contexts: dict[str, tuple[int, ...]], tasks: dict[str, list[Item]]
) -> None:
    """One context; an item's name ends with the part that its fact stands in."""
    rng, key = random.Random(seed), str(seed)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special=False))

    cities = rng.sample(CITIES, 2 * suite.facts)
    words = [word_fact(city, rng) for city in cities[: suite.facts]]
    numbers = [number_fact(city, rng) for city in cities[suite.facts :]]
    sentences, _ = passage(suite.words, rng)
    both = [fact for pair in zip(words, numbers, strict=True) for fact in pair]
    contexts[key] = tuple(tokenizer.encode(plant(both, sentences, rng), add_special=True))
    for ending, reading in suite.readings.items():
        for task, facts in ("words", words), ("numbers", numbers):
            for part, fact in enumerate(facts):
                tasks[task + ending].append(
                    Item(
                        id=f"{key}/{part}",
                        context_id=key,
                        question=ids(fact.question + fact.stem),
                        answer=ids(fact.answer),
                        reading=reading,
                    )
                )
        if suite.tells:
            tasks["the text" + ending].append(OfText(id=key, context_id=key, reading=reading))
