"""Contexts, and questions about them: read from a directory of JSON files, or generated (``evaluation.suite``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a context is read: whole, and then compressed once."""


WHOLE = Reading()


@dataclass(frozen=True, kw_only=True)
class InParts(Reading):
    """As a prompt that is so many times the pool: each part is compressed before the next is read."""

    pools: float


@dataclass(frozen=True, kw_only=True)
class Continual(Reading):
    """As an answer that grows under one budget, and is compressed whenever so many tokens have come."""

    every: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question that follows a context, and the answer that should follow it, as tokens."""

    id: str
    context_id: str
    question: tuple[int, ...]
    """Read after the context was compressed."""
    answer: tuple[int, ...]
    told: tuple[int, ...] = ()
    """Read with the context, before it is compressed: what makes a task query-aware."""
    reading: Reading = WHOLE

    @property
    def room(self) -> int:
        """Tokens that are cached after the context."""
        return len(self.told)


@dataclass(frozen=True, kw_only=True)
class OfText(Item):
    """Not a question: how likely the model finds the context itself, while it is read."""

    question: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Written(Item):
    """A question whose answer the model writes, greedily, and a metric scores (``evaluation.metrics``)."""

    answer: tuple[int, ...] = ()
    references: tuple[str, ...]
    metric: str
    every: bool = False
    """The score is the mean over the references; else the best."""
    classes: tuple[str, ...] = ()
    most_tokens: int
    first_line: bool = False
    """Only the answer's first line is scored."""
    ends_line: bool = False
    """The answer has at least one token, and ends with the line."""

    @property
    def room(self) -> int:
        return len(self.told) + len(self.question) + self.most_tokens


@dataclass(frozen=True, kw_only=True)
class Task:
    """Items to be scored together."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """Tasks over shared contexts."""

    contexts: dict[str, tuple[int, ...]]
    tasks: tuple[Task, ...]

    @property
    def longest(self) -> int:
        """Tokens that are cached at most."""
        return max(len(self.contexts[item.context_id]) + item.room for task in self.tasks for item in task.items)

    def only(self, names: Sequence[str] | None, contexts: int | None) -> TaskSet:
        """The tasks of these names, with the items of the first so many contexts; None: all.

        Raises:
          ValueError: there is none of a name, or nothing is left.
        """
        known = [task.name for task in self.tasks]
        if unknown := [name for name in names or () if name not in known]:
            raise ValueError(f"--only: no task is named {', '.join(map(repr, unknown))}; there are {'; '.join(known)}")
        if contexts is not None and contexts < 1:
            raise ValueError(f"--contexts must be at least 1, got {contexts}")
        first = set(list(self.contexts)[:contexts])
        tasks = (
            replace(task, items=tuple(item for item in task.items if item.context_id in first))
            for task in self.tasks
            if names is None or task.name in names
        )
        left = tuple(task for task in tasks if task.items)
        if not left:
            raise ValueError(f"no item is about the first {contexts} contexts; give more --contexts")
        return replace(self, contexts={key: self.contexts[key] for key in self.contexts if key in first}, tasks=left)


def read_tasks(directory: Path, tokenizer: Tokenizer | None, vocab_size: int) -> TaskSet:
    """``contexts.json`` and every other ``NAME.json`` of a directory.

    A text is tokenised as it stands, a context with the tokenizer's special tokens and the rest without.

    Raises:
      ValueError: a file that isn't what it should be; the message names the file, the entry and the field.
    """
    if not directory.is_dir():
        raise ValueError(f"--tasks {directory} is no directory; give one with contexts.json and NAME.json files")
    reader = _Reader(tokenizer, vocab_size)
    path = directory / "contexts.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no contexts.json, a list of {{id, text}} or {{id, context_ids}}")
    contexts: dict[str, tuple[int, ...]] = {}
    for where, entry in _entries(path):
        key = _id(where, entry, "id")
        if key in contexts:
            raise ValueError(f"{where}: id {key!r} is there twice")
        contexts[key] = reader.tokens(where, entry, "text", "context_ids", special=True)
    files = sorted(p for p in directory.glob("*.json") if p.name != "contexts.json")
    if not files:
        raise ValueError(f"{directory} has no tasks: no NAME.json beside contexts.json")
    return TaskSet(contexts=contexts, tasks=tuple(_task(path, contexts, reader) for path in files))


def _task(path: Path, contexts: dict[str, tuple[int, ...]], reader: _Reader) -> Task:
    items: dict[str, Item] = {}
    for where, entry in _entries(path):
        key, context = _id(where, entry, "id"), _id(where, entry, "context_id")
        if key in items:
            raise ValueError(f"{where}: id {key!r} is there twice")
        if context not in contexts:
            raise ValueError(f"{where}: context_id {context!r} is none of contexts.json's")
        items[key] = Item(
            id=key,
            context_id=context,
            question=reader.tokens(where, entry, "question", "question_ids"),
            answer=reader.tokens(where, entry, "answer", "answer_ids"),
        )
    return Task(name=path.stem, items=tuple(items.values()))


@dataclass(frozen=True)
class _Reader:
    tokenizer: Tokenizer | None
    vocab_size: int

    def tokens(self, where: str, entry: dict[str, Any], text: str, ids: str, special: bool = False) -> tuple[int, ...]:
        """Of whichever of the two fields is there."""
        if (text in entry) == (ids in entry):
            raise ValueError(f"{where} needs one of {text!r} and {ids!r}, and has {sorted(entry)}")
        if text in entry:
            if not isinstance(entry[text], str):
                raise ValueError(f"{where}: {text!r} must be a string, got {entry[text]!r}")
            if self.tokenizer is None:
                raise ValueError(f"{where}: the model has no tokenizer, so give {ids!r} instead of {text!r}")
            found: Sequence[int] = self.tokenizer.encode(entry[text], add_special=special)
        else:
            found = entry[ids]
            if not isinstance(found, list) or any(type(i) is not int or not 0 <= i < self.vocab_size for i in found):
                raise ValueError(f"{where}: {ids!r} must be a list of token ids from 0 to {self.vocab_size - 1}")
        if not found:
            raise ValueError(f"{where}: {text if text in entry else ids!r} holds no token")
        return tuple(found)


def _entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list, each with words for where it is."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} must hold a list of objects, and at least one")
    for i, entry in enumerate(found):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, entry {i}: must be an object, got {entry!r}")
    return [(f"{path}, entry {i}", entry) for i, entry in enumerate(found)]


def _id(where: str, entry: dict[str, Any], field: str) -> str:
    if not isinstance(entry.get(field), str | int):
        raise ValueError(f"{where} needs {field!r}, a string or a number, and has {entry.get(field)!r}")
    return str(entry[field])
