"""The TPU compiler's schedule of a kernel, read from its text: one instruction bundle a cycle."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:[> ]*\{(.*)")
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
OP = re.compile(r"(?:(%\w+)(?:, %\w+)* = )?([a-z][\w.]*)\s*(.*)", re.DOTALL)
ATTRIBUTE = re.compile(r"\[\w+:\$\w+\]")
PREDICATE = re.compile(r"\((!?)(%\w*p\d+|%\w+)(?:, (%\w+))?\)(?:, )?")
VALUE = re.compile(r"%\w+")
MOST_DELAY_SLOTS = 8
TARGET = re.compile(r"target bundleno = (\d+)")
UNITS: tuple[str, ...] = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
"""Columns of the compiler's table of the slots that a bundle fills."""


class ScheduleError(Exception):
    """A schedule that can't be read or followed; the message says where."""


@dataclass(frozen=True)
class Op:
    name: str
    result: str | None
    """The value that it defines, as ``%s12_s3``: after the underscore is the register."""
    operands: tuple[str, ...]
    predicate: str | None = None
    """It runs only where this holds."""
    negated: bool = False
    otherwise: str | None = None
    """What the result is where it doesn't run."""
    target: int | None = None
    """Of a branch: the bundle."""

    @cached_property
    def reads(self) -> frozenset[str]:
        """Values that it takes."""
        return frozenset(VALUE.findall(" ".join((*self.operands, self.predicate or "", self.otherwise or ""))))

    @property
    def starts_copy(self) -> bool:
        return self.name.startswith("dma.") and not self.name.startswith("dma.done")

    @property
    def is_vector(self) -> bool:
        """It fills a slot of a vector unit, in which there is a result to wait for or data to move."""
        return self.name[0] == "v" and not self.name.startswith(("vsync", "vpop.sfrf", "vphi"))


@dataclass(frozen=True)
class Bundle:
    ops: tuple[Op, ...]
    is_labelled: bool = False
    """Branches come here, or fall through to it."""

    @cached_property
    def branch(self) -> Op | None:
        return next((op for op in self.ops if op.target is not None), None)


@dataclass(frozen=True)
class Program:
    bundles: tuple[Bundle, ...]
    slots: tuple[tuple[int, ...], ...]
    """Of each bundle, how many of each of ``UNITS`` it fills; without any where the compiler gave no table."""
    capacity: tuple[int, ...]
    """Slots of each of ``UNITS`` in a bundle."""

    @cached_property
    def delay_slots(self) -> int:
        """Bundles after a branch that still run: a loop's end is labelled after them."""
        labelled = [at for at, bundle in enumerate(self.bundles) if bundle.is_labelled]
        after = [
            min((label - at for label in labelled if label > at), default=len(self.bundles))
            for at, bundle in enumerate(self.bundles)
            if bundle.branch is not None and bundle.branch.target is not None and bundle.branch.target <= at
        ]
        if not after or min(after) > MOST_DELAY_SLOTS + 1:
            raise ScheduleError("no loop whose end is labelled: is the grid of one step only?")
        return min(after) - 1


def parse_op(text: str) -> Op | None:
    match = OP.match(ATTRIBUTE.sub("", text).strip())
    if match is None:
        return None
    result, name, rest = match[1], match[2], match[3].strip()
    predicate, negated, otherwise = None, False, None
    if found := PREDICATE.search(rest):
        predicate, negated, otherwise = found[2], found[1] == "!", found[3]
        rest = rest[: found.start()] + rest[found.end() :]
    target = TARGET.search(rest)
    if name.startswith("sbr") and target is None:
        raise ScheduleError(f"a branch that is not to a bundle: {text.strip()[:100]}")
    operands = tuple(part.strip() for part in rest.split(",")) if rest and target is None else ()
    return Op(name, result, operands, predicate, negated, otherwise, int(target[1]) if target else None)


def in_order(ops: list[Op]) -> tuple[Op, ...]:
    """As they take effect: a loop's values; what only names a register anew before what takes it; stores."""
    done = [op for op in ops if op.name == "sphi"]
    left = [op for op in ops if op.name not in ("sphi", "sst")]
    while left:
        waiting = {op.result for op in left if op.result}
        ready = [op for op in left if not waiting & op.reads - {op.result}] or left
        done += ready
        left = [op for op in left if op not in ready]
    return (*done, *(op for op in ops if op.name == "sst"))


def parse(text: str) -> tuple[Bundle, ...]:
    """The bundles of a schedule; they are numbered from 0 on, as branches name them."""
    lines: list[tuple[bool, str]] = []
    for line in COMMENT.sub("", text).splitlines():
        if match := BUNDLE.match(line):
            if int(match[1], 16) != len(lines):
                raise ScheduleError(f"bundle {match[1]} follows on {len(lines) - 1:#x}")
            lines.append((match[2] is not None, match[3]))
        elif lines:
            lines[-1] = lines[-1][0], lines[-1][1] + line
    if not lines:
        raise ScheduleError("no bundle in the text")
    bundles = []
    for is_labelled, line in lines:
        ops = [parse_op(part) for part in line[: line.rfind("}")].split(";;")]
        bundles.append(Bundle(in_order([op for op in ops if op is not None]), is_labelled))
    return tuple(bundles)


def parse_slots(text: str) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Capacity of a bundle and slots that each fills."""
    rows = [tuple(map(int, line.split())) for line in text.splitlines() if re.fullmatch(r"[\d ]+", line)]
    if not rows or any(len(row) != len(UNITS) for row in rows):
        raise ScheduleError(f"the table of slots doesn't have the columns {', '.join(UNITS)}")
    return rows[0], rows[1:]


def read(directory: Path, kernel: str) -> Program:
    """The schedule of the kernel of this name among what the compiler dumped."""
    name = re.compile(rf"(\d+-{re.escape(kernel)}(?:\.\d+)?)-\d+-packed-bundles-post-ra\.txt")
    found = [match for path in directory.iterdir() if (match := name.fullmatch(path.name))]
    if len(found) != 1:
        raise ScheduleError(f"expected one schedule of {kernel} in {directory}, got {[match[0] for match in found]}")
    bundles = parse((directory / found[0][0]).read_text())
    [table] = directory.glob(f"{found[0][1]}-*-pre-delay_hlo-static-per-bundle-utilization.txt")
    capacity, slots = parse_slots(table.read_text())
    if len(slots) != len(bundles):
        raise ScheduleError(f"{kernel} has {len(bundles)} bundles, and slots of {len(slots)}")
    return Program(bundles, tuple(slots), capacity)
