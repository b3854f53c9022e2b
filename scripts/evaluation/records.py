"""Outcomes of single items, kept in a journal as they come; records and a table made from them."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from evaluation.scoring import Outcome
from evaluation.tasks import TaskSet

Key = tuple[str, float, str]
"""Policy, ratio, task."""


class Journal:
    """A file of JSON lines beside the results: what it holds isn't asked again.

    Raises:
      ValueError: the file is of another run.
    """

    def __init__(self, path: Path | None, run: dict[str, object]):
        self.path = path
        self.outcomes: dict[Key, dict[str, Outcome]] = defaultdict(dict)
        if path is None:
            return
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = lines[:-1]  # a torn last line is asked again
        if whole:
            before = json.loads(whole[0])
            if before != run:
                changed = sorted(k for k in before.keys() | run.keys() if before.get(k) != run.get(k))
                raise ValueError(
                    f"{path} is of a run with other {', '.join(changed)}; remove it, or name another --json"
                )
        for line in whole[1:]:
            policy, ratio, task, outcome = json.loads(line)
            self.outcomes[policy, ratio, task][outcome["item"]] = Outcome(**outcome)
        if not whole:
            path.write_text(json.dumps(run) + "\n", encoding="utf-8")
        elif lines[-1]:
            os.truncate(path, path.stat().st_size - len(lines[-1]))

    def add(self, key: Key, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self.outcomes[key][outcome.item] = outcome
        if self.path is not None:
            text = "".join(json.dumps([*key, asdict(outcome)]) + "\n" for outcome in outcomes)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One policy, ratio and task."""

    policy: str
    ratio: float
    task: str
    accuracy: float
    """Of answers that are written, the mean score."""
    n: int
    low: float
    """Bounds of the accuracy's 95 % confidence interval (Wilson); of scores between 0 and 1, wider than it need be."""
    high: float
    token_accuracy: float | None
    nll: float | None
    """Mean over items, nats a token; like ``token_accuracy`` None of answers that are written."""
    bytes_held: int
    """Mean over items: blocks with scores and positions, and tables, as allocated; K and V are bfloat16."""
    bytes_full: int
    """Mean over items: K and V of all tokens at 16 bits a value."""
    seconds_read: float
    """Mean over items: reading, scoring and all."""
    seconds_compress: float

    @property
    def seconds(self) -> float:
        return self.seconds_read + self.seconds_compress


def finished(journal: Journal, keys: list[Key], tasks: TaskSet) -> list[Record]:
    """Of what is answered to the last item."""
    items = {task.name: [item.id for item in task.items] for task in tasks.tasks}
    found = [(key, [journal.outcomes[key].get(item) for item in items[key[2]]]) for key in keys]
    return [record(key, [o for o in outcomes if o]) for key, outcomes in found if all(outcomes)]


def record(key: Key, outcomes: list[Outcome]) -> Record:
    policy, ratio, task = key
    right, n = sum(o.correct for o in outcomes), len(outcomes)
    low, high = wilson(right, n)

    def mean(field: str) -> float:
        return fmean(getattr(o, field) for o in outcomes)

    told = all(o.nll is not None for o in outcomes)

    return Record(
        policy=policy,
        ratio=ratio,
        task=task,
        accuracy=right / n,
        n=n,
        low=low,
        high=high,
        token_accuracy=mean("token_accuracy") if told else None,
        nll=mean("nll") if told else None,
        bytes_held=round(mean("bytes_held")),
        bytes_full=round(mean("bytes_full")),
        seconds_read=mean("seconds_read"),
        seconds_compress=mean("seconds_compress"),
    )


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval in which the true rate lies, 95 times of 100, after ``right`` of ``n``."""
    rate = right / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def write_json(path: Path, records: list[Record]) -> None:
    """All or nothing: whoever reads the file sees the old one or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps([asdict(r) | {"seconds": r.seconds} for r in records], indent=1) + "\n")
    os.replace(new, path)


def read_json(path: Path) -> list[Record]:
    """What ``write_json`` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return [Record(**{k: v for k, v in r.items() if k != "seconds"}) for r in found]


def table(records: list[Record]) -> str:
    """Markdown; ``kept`` is the accuracy over that of the full cache, where it was measured."""
    full = {r.task: r.accuracy for r in records if r.policy == "none"}
    lines = [
        "| task | policy | ratio | accuracy | 95 % | kept | token acc. | NLL | MB held | full / held | s | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(records, key=lambda r: (r.task, r.ratio, r.policy)):
        tokens, nll = ("" if x is None else f"{x:.3f}" for x in (r.token_accuracy, r.nll))
        kept = f"{r.accuracy / full[r.task]:.2f}" if full.get(r.task) else ""
        lines.append(
            f"| {r.task} | {r.policy} | {r.ratio:g} | {r.accuracy:.3f} | {r.low:.2f} to {r.high:.2f} | {kept} "
            f"| {tokens} | {nll} | {r.bytes_held / 1e6:.2f} | {r.bytes_full / r.bytes_held:.2f} "
            f"| {r.seconds:.1f} | {r.n} |"
        )
    return "\n".join(lines)
