"""LongBench or RULER from a directory of their published files, as tokens."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation import longbench, ruler
from evaluation.samples import Sample
from evaluation.tasks import Item, Task, TaskSet
from models import Tokenizer

MARK = "\0"
"""In place of the prompt, to see what a chat format puts around it."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How prompts are put to the model."""

    aware: bool = False
    """The question is read with the context, before anything is compressed: the whole prompt, but for its last token,
    so that the answer's first token, too, comes from what is left."""
    chat: bool = False
    """Prompts are put in the model's chat format, where the benchmark does so."""
    max_length: int | None = None
    """Tokens of a prompt at most, where the benchmark cuts them; None: what the model's context leaves room for."""
    limit: int | None = None
    """Samples of each file, the first ones; None: all."""


def read_benchmark(directory: Path, tokenizer: Tokenizer, max_context: int, protocol: Protocol) -> TaskSet:
    """All tasks of a directory: ``TASK.jsonl`` is LongBench's, ``TASK/validation.jsonl`` is RULER's.

    Raises:
      ValueError: neither, a file that isn't as published, or a prompt that is too long and may not be cut.
    """
    form = next((form for form in (longbench, ruler) if form.find(directory)), None)
    if form is None:
        raise ValueError(
            f"--benchmark {directory} has neither LongBench's TASK.jsonl nor RULER's TASK/validation.jsonl files; give "
            "the directory that holds them"
        )
    contexts: dict[tuple[int, ...], str] = {}
    tasks: dict[str, list[Item]] = defaultdict(list)
    for name, path in form.find(directory).items():
        for sample in form.samples(name, path, chat=protocol.chat, limit=protocol.limit):
            context, question = tokens(sample, tokenizer, max_context, protocol)
            key = contexts.setdefault(context, f"{name}/{sample.item.id}")
            tasks[sample.task].append(replace(sample.item, context_id=key, question=question))
    if not tasks:
        raise ValueError(f"--benchmark {directory}: its files are empty")
    return TaskSet(
        contexts={key: context for context, key in contexts.items()},
        tasks=tuple(Task(name=name, items=tuple(items)) for name, items in tasks.items()),
    )


def tokens(
    sample: Sample, tokenizer: Tokenizer, max_context: int, protocol: Protocol
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of what is compressed, and of what is read afterwards. A prompt that is too long loses its middle."""
    before, after = sample.before, sample.after
    beginning = tokenizer.encode
    if sample.chat:
        beginning = tokenizer.encode_chat
        opening, closing = tokenizer.chat([{"role": "user", "content": MARK}]).split(MARK)
        before, after = opening + before, after + closing
    after += sample.start
    if protocol.aware:
        whole = beginning(before + after)
        context, question = whole[:-1], whole[-1:]
    else:
        context, question = beginning(before), tokenizer.encode(after, add_special=False)
    most = max_context - sample.item.most_tokens
    if sample.cuts and protocol.max_length is not None:
        most = min(most, protocol.max_length)
    if len(context) + len(question) > most:
        half = most // 2
        what = f"{sample.task}, line {sample.item.id}: the prompt has {len(context) + len(question)} tokens"
        if not sample.cuts:
            raise ValueError(
                f"{what}, and the model's context has room for {most} before the answer; make shorter ones"
            )
        if len(question) > half:
            raise ValueError(f"{what}, {len(question)} of them behind the context, which don't fit in half of {most}")
        context = context[:half] + context[len(context) - (half - len(question)) :]
    return tuple(context), tuple(question)
