"""Runs the scalar half of a schedule: which bundles a TPU's core passes, cycle by cycle, for lengths and tables given.

Nothing is guessed of which branch a kernel takes: its scalar registers, SMEM and predicates are followed, from the
operands that it prefetches. Vector values aren't known, and what comes of them isn't either (``None``): a branch that
depends on it, or on an instruction not known here, is an error that names it. Copies and waits for them take no time:
their bytes are counted beside.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from schedules.bundles import Bundle, Op, Program, ScheduleError

DIVISION = "sdivrem.u32"
"""Its quotient and then its remainder are taken from the result one by one."""
MOST_CYCLES = 20_000_000
SPAN = 1 << 20
"""Words between the made-up addresses of two allocations, or operands."""
CORE = "#allocation0"
"""The word of SMEM that tells a core its number."""
TERM = re.compile(r"%\w+|\$0x[0-9a-f]+|#allocation\w+|-?\d+")


def signed(x: int) -> int:
    return ((x + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def unsigned(x: int) -> int:
    return x & 0xFFFFFFFF


def _of_unsigned(function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    return lambda a, b: function(unsigned(a), unsigned(b))


ARITHMETIC: dict[str, Callable[..., int]] = {
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "smulhi.u32": _of_unsigned(lambda a, b: a * b >> 32),
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": lambda a, b: a << (b & 31),
    "sshrl": lambda a, b: unsigned(a) >> (b & 31),
    "sshra": lambda a, b: a >> (b & 31),
    "smin.u32": _of_unsigned(min),
    "smax.u32": _of_unsigned(max),
    "smin.s32": min,
    "smax.s32": max,
    "smov": lambda a: a,
    "scalar_lea": lambda *parts: sum(parts),
    "int_to_ptr": lambda a: a,
}
COMPARISON = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
LOGIC: dict[str, Callable[..., bool]] = {
    "pand": lambda a, b: a and b,
    "por": lambda a, b: a or b,
    "pxor": lambda a, b: a != b,
    "pnand": lambda a, b: not (a and b),
    "pnor": lambda a, b: not (a or b),
    "pneg": lambda a: not a,
    "pmov": lambda a: a,
}


@dataclass
class Step:
    """What ran of one pass of the grid's loop."""

    counts: list[int]
    """Of each bundle."""
    copies: int = 0
    """Copies started."""


class ScalarCore:
    """One core, at the start of a kernel."""

    def __init__(self, program: Program, operands: Mapping[int, Any]):
        """
        Args:
          program: the schedule.
          operands: what the kernel prefetches, flat, by the operand's number.
        """
        self.program, self.operands = program, operands
        self.values: dict[str, Any] = {}
        self.registers: dict[str, Any] = {}
        self.allocations: dict[str, int] = {}
        self.smem: dict[int, int | None] = {self._address(CORE): 0}
        self.sources: dict[int, Any] = {}
        self.unknown: dict[str, str] = {}
        self.copies = 0
        self.code = [self._compile(bundle) for bundle in program.bundles]

    def run(self) -> list[Step]:
        """Until the end; the passes of the loop that spans most of the kernel: the grid's."""
        bundles, header = self.program.bundles, self._header()
        steps, step = [], Step([0] * len(bundles))
        at, cycles, pending, branch_in = 0, 0, None, -1
        while at < len(bundles):
            cycles += 1
            if cycles > MOST_CYCLES:
                raise ScheduleError(f"no end after {MOST_CYCLES:,} cycles")
            step.counts[at] += 1
            for run in self.code[at]:
                run()
            branch = bundles[at].branch
            if branch is not None and self._holds(branch, at):
                if pending is not None:
                    raise ScheduleError(f"a branch in another's delay slots, in bundle {at:#x}")
                pending, branch_in = branch.target, self.program.delay_slots + 1
            branch_in -= 1
            at += 1
            if pending is not None and branch_in == 0:
                at, pending = pending, None
            if at == header and pending is None:
                step.copies, self.copies = self.copies, 0
                steps.append(step)
                step = Step([0] * len(bundles))
        step.copies = self.copies
        return [*steps[1:], step]

    def _header(self) -> int:
        loops = [
            (at - bundle.branch.target, bundle.branch.target)
            for at, bundle in enumerate(self.program.bundles)
            if bundle.branch is not None and bundle.branch.target is not None and bundle.branch.target <= at
        ]
        if not loops:
            raise ScheduleError("no loop: is the grid of one step only?")
        return max(loops)[1]

    def _holds(self, op: Op, at: int) -> bool:
        if op.predicate is None:
            return True
        known = self.values.get(op.predicate)
        if known is None:
            why = self.unknown.get(op.predicate, "nothing sets it")
            raise ScheduleError(f"the branch in bundle {at:#x} depends on {op.predicate}, which isn't known: {why}")
        return known != op.negated

    def _compile(self, bundle: Bundle) -> list[Callable[[], None]]:
        return [self._of(op) for op in bundle.ops if op.target is None and self._matters(op)]

    @staticmethod
    def _matters(op: Op) -> bool:
        return op.name in ("sst", DIVISION) or op.starts_copy or (op.result or "")[1:2] in ("s", "p")

    def _of(self, op: Op) -> Callable[[], None]:
        """What an instruction does."""
        if op.name == "sphi":
            return self._phi(op)
        if op.name == "sst":
            return self._store(op)
        if op.starts_copy:
            return self._copy(op)
        return self._assign(op, self._evaluation(op))

    @staticmethod
    def _register(value: str) -> str:
        return value.rsplit("_", 1)[-1]

    def _set(self, op: Op, value: Any) -> None:
        name = str(op.result)
        self.values[name] = self.registers[self._register(name)] = value
        if value is None:
            self.unknown[name] = next((self.unknown[x] for x in op.reads if x in self.unknown), f"{op.name} gives it")

    def _phi(self, op: Op) -> Callable[[], None]:
        register = self._register(str(op.result))
        if any(self._register(x) != register for x in op.operands):
            raise ScheduleError(f"{op.result} comes from another register: {op.operands}")

        def run() -> None:
            self._set(op, self.registers.get(register))

        return run

    def _runs(self, op: Op) -> Callable[[], bool | None]:
        """Whether its predicate lets it run; None: that isn't known."""
        predicate, negated, values = op.predicate, op.negated, self.values
        if predicate is None:
            return lambda: True
        return lambda: None if (known := values.get(predicate)) is None else known != negated

    def _assign(self, op: Op, evaluate: Callable[[], Any]) -> Callable[[], None]:
        if op.predicate is None:
            return lambda: self._set(op, evaluate())
        runs, otherwise = self._runs(op), self._term(op.otherwise) if op.otherwise else None

        def run() -> None:
            known = runs()
            if known is None:
                self._set(op, None)
            elif known:
                self._set(op, evaluate())
            elif otherwise is not None:
                self._set(op, otherwise())

        return run

    def _evaluation(self, op: Op) -> Callable[[], Any]:
        name, operands = op.name, [self._term(x) for x in op.operands]
        parts = name.split(".")
        if name.startswith("inlined_call_operand"):
            return self._operand(op)
        if name == "sld":
            [address] = operands
            return lambda: self.smem.get(address())
        if name == DIVISION:
            return _known(lambda a, b: [signed(x) for x in divmod(unsigned(a), unsigned(b))], operands)
        if name == "spop.drf":
            return _known(lambda results: results.pop(0), operands)
        if name == "scalar_select":
            return _known(lambda chosen, yes, no: yes if chosen else no, operands)
        if parts[0] == "scmp":
            compare = COMPARISON[parts[1]]
            view = unsigned if parts[2] == "u32" else signed
            return _known(lambda a, b: compare(view(a), view(b)), operands)
        if parts[0] in LOGIC:
            return _known(LOGIC[parts[0]], operands)
        function = ARITHMETIC.get(".".join(parts[:2])) or ARITHMETIC.get(parts[0])
        if function is None:
            return lambda: None
        return _known(lambda *xs: signed(function(*xs)) if type(xs[0]) is int else function(*xs), operands)

    def _operand(self, op: Op) -> Callable[[], int]:
        """Its address; or itself, if it is one word in a register."""
        text = ", ".join(op.operands)
        found = re.search(r"index: (\d+), kind: input", text)
        words = self.operands.get(int(found[1])) if found else None
        if words is not None and "no memory space" in text:
            return lambda: int(words[0])
        address = SPAN * (1000 + len(self.sources))
        if words is not None:
            self.sources[address] = self.sources[signed(address << 4)] = words
        return lambda: address

    def _address(self, allocation: str) -> int:
        return self.allocations.setdefault(allocation, SPAN * (1 + len(self.allocations)))

    def _term(self, text: str) -> Callable[[], Any]:
        """The value of an operand: a sum of registers, numbers and allocations' addresses."""
        known, names = 0, list[str]()
        if re.fullmatch(r"-?\d+", text):
            number = signed(int(text))
            return lambda: number
        for term in TERM.findall(text):
            if term[0] == "%":
                names.append(term)
            elif term[0] == "#":
                known += self._address(term)
            else:
                known += int(term[1:], 16) if term[0] == "$" else int(term)
        values = self.values
        if not names:
            return lambda: known
        if len(names) == 1 and known == 0:
            return partial(values.get, names[0])
        return _known(lambda *parts: known + sum(parts), [partial(values.get, name) for name in names])

    def _store(self, op: Op) -> Callable[[], None]:
        runs, (address, value) = self._runs(op), (self._term(x) for x in _store_parts(op))

        def run() -> None:
            known = runs()
            if known is not False:
                if (at := address()) is None:
                    raise ScheduleError(f"sst to an address that isn't known: {op.operands}")
                self.smem[at] = value() if known else None

        return run

    def _copy(self, op: Op) -> Callable[[], None]:
        runs, to_smem = self._runs(op), op.name.endswith("_to_smem")
        source, target = (self._term(op.operands[i]) for i in (0, 2))

        def run() -> None:
            known = runs()
            if known is None:
                raise ScheduleError(f"whether {op.name} runs depends on {op.predicate}, which isn't known")
            self.copies += known and not to_smem
            if known and to_smem:
                words, at = self.sources.get(source()), target()
                if words is None:
                    raise ScheduleError(f"{op.name} {op.operands}: not from a prefetched operand that was given")
                self.smem.update((at + i, int(word)) for i, word in enumerate(words))

        return run


def _store_parts(op: Op) -> tuple[str, str]:
    """Address and value of ``sst [smem:…] %s1``, which no comma parts."""
    address, value = ", ".join(op.operands).rsplit(" ", 1)
    return address, value


def _known(function: Callable[..., Any], operands: list[Callable[[], Any]]) -> Callable[[], Any]:
    def run() -> Any:
        values = [x() for x in operands]
        return None if None in values else function(*values)

    return run
