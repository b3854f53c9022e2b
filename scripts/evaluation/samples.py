"""What a benchmark's files are read into, before any tokenizer: a prompt's text up to its question, and the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.tasks import Written


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt of a benchmark."""

    task: str
    before: str
    """The prompt's part that ends with the context."""
    after: str
    """All that follows it: the question."""
    start: str = ""
    """Of the answer, given to the model; behind the chat format, where there is one."""
    chat: bool
    """The prompt is put in the model's chat format."""
    cuts: bool
    """A prompt that is too long loses its middle; else it is an error."""
    item: Written
    """How the answer counts; without context and question."""


def lines(path: Path, limit: int | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The first objects of a JSONL file: words for where each is, the number of its line, and itself."""
    rows = path.read_bytes().split(b"\n")
    for number, row in [(i, row) for i, row in enumerate(rows, 1) if row.strip()][:limit]:
        where = f"{path}, line {number}"
        try:
            entry = json.loads(row)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON in UTF-8: {error}") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must hold an object, got {entry!r:.80}")
        yield where, str(number), entry


def text(where: str, entry: dict[str, Any], field: str) -> str:
    found = entry.get(field)
    if not isinstance(found, str):
        raise ValueError(f"{where} needs {field!r}, a string, and has {found!r:.80}")
    return found


def texts(where: str, entry: dict[str, Any], field: str) -> tuple[str, ...]:
    found = entry.get(field)
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise ValueError(f"{where} needs {field!r}, a list of at least one string, and has {found!r:.80}")
    return tuple(found)
