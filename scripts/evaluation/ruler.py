"""RULER (arXiv 2404.06654) from the files that its own scripts write, ``TASK/validation.jsonl`` or ``TASK/test.jsonl``.

The words that begin each question, and the limits, are from its scripts (Apache-2.0, copyright 2024 NVIDIA):
https://github.com/NVIDIA/RULER, ``scripts/data/synthetic/constants.py`` and ``scripts/eval/synthetic/constants.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evaluation.samples import Sample, lines, text, texts
from evaluation.tasks import Written


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Tasks whose names begin alike."""

    question: tuple[str, ...]
    """What a question begins with; where it occurs more than once, the last is meant, the others are examples."""
    most_tokens: int
    every: bool = True
    """All references are asked for; else any."""


KINDS = {
    "niah": Kind(question=("What is the special magic ", "What are all the special magic "), most_tokens=128),
    "vt": Kind(question=("Question: Find all variables that are assigned the value ",), most_tokens=30),
    "cwe": Kind(question=("Question: What are the 10 most common words in the above list?",), most_tokens=120),
    "fwe": Kind(question=("Question: Do not provide any explanation.",), most_tokens=50),
    "qa": Kind(question=("Answer the question based on the given documents.",), most_tokens=32, every=False),
}


def find(directory: Path) -> dict[str, Path]:
    """Files by their tasks; of a task with both, the validation's."""
    return {
        path.parent.name: path for name in ("test", "validation") for path in sorted(directory.glob(f"*/{name}.jsonl"))
    }


def samples(name: str, path: Path, *, chat: bool, limit: int | None) -> Iterator[Sample]:
    """Of one file.

    Raises:
      ValueError: no such task, or a line that isn't as published.
    """
    kind = KINDS.get(name.split("_")[0])
    if kind is None:
        raise ValueError(f"{path}: RULER has no task {name!r}; its tasks begin with {', '.join(KINDS)}")
    for where, number, entry in lines(path, limit):
        prompt = text(where, entry, "input")
        at = max(prompt.rfind(start) for start in kind.question)
        if at < 1:
            raise ValueError(f"{where}: 'input' has no question of a {name} task, which begins {kind.question[0]!r}")
        if chat and "answer_prefix" not in entry:
            raise ValueError(
                f"{where} has no 'answer_prefix', which belongs behind the chat format; leave --chat out, and let "
                "RULER put the format into its files (model_template_type)"
            )
        yield Sample(
            task=name,
            before=prompt[:at],
            after=prompt[at:],
            start=text(where, {"answer_prefix": "", **entry}, "answer_prefix"),
            chat=chat,
            cuts=False,
            item=Written(
                id=number,
                context_id="",
                question=(),
                references=texts(where, entry, "outputs"),
                metric="contains",
                every=kind.every,
                most_tokens=kind.most_tokens,
            ),
        )
