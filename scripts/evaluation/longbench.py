"""LongBench (arXiv 2308.14508) from its own files, ``TASK.jsonl``, and LongBench-E from ``TASK_e.jsonl``.

Prompts, limits and metrics are its authors', in ``longbench.json`` (MIT, copyright 2023 THU-KEG and Zhipu AI).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from evaluation.metrics import require
from evaluation.samples import Sample, lines, text, texts
from evaluation.tasks import Written

LENGTHS = ((4000, "0-4k"), (8000, "4-8k"), (float("inf"), "8k+"))
"""Words, in the file's own count, by which LongBench-E is reported."""


def find(directory: Path) -> dict[str, Path]:
    """Files by their tasks."""
    return {path.stem: path for path in sorted(directory.glob("*.jsonl"))}


def samples(name: str, path: Path, *, chat: bool, limit: int | None) -> Iterator[Sample]:
    """Of one file. Few-shot and code tasks are never put in a chat format, as the authors say.

    Raises:
      ValueError: no such task, a metric's package that isn't there, or a line that isn't as published.
    """
    tasks = protocol()
    task = tasks.get(name.removesuffix("_e"))
    if task is None:
        raise ValueError(
            f"{path}: LongBench has no task {name!r}; it has {', '.join(tasks)}, each also with _e behind it"
        )
    require(task["metric"], name)
    before, _, after = task["prompt"].partition("{context}")
    for where, number, entry in lines(path, limit):
        yield Sample(
            task=f"{name}, {_group(where, entry)}" if name.endswith("_e") else name,
            before=before + text(where, entry, "context"),
            after=after.replace("{input}", text(where, entry, "input")),
            chat=chat and task.get("chat", True),
            cuts=True,
            item=Written(
                id=number,
                context_id="",
                question=(),
                references=texts(where, entry, "answers"),
                metric=task["metric"],
                classes=texts(where, entry, "all_classes") if task["metric"] == "classification" else (),
                most_tokens=task["most_tokens"],
                first_line=task.get("first_line", False),
                ends_line=task.get("ends_line", False),
            ),
        )


def _group(where: str, entry: dict[str, Any]) -> str:
    length = entry.get("length")
    if not isinstance(length, int):
        raise ValueError(f"{where} needs 'length', a whole number, and has {length!r:.80}")
    return next(group for most, group in LENGTHS if length < most)


@cache
def protocol() -> dict[str, dict[str, Any]]:
    """Prompt, most tokens of an answer and metric of each task."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))["tasks"]
