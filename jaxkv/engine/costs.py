"""What passes and steps were seen to cost, and whether another program is worth compiling."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class PassShape(NamedTuple):
    """Of a pass of the model over prompts: one program each."""

    tokens: int
    """That go through the model, padding included."""
    rows: int = 1
    length: int | None = None
    """Tokens of a prompt at most, where those of several lie one after the other; None: one prompt's chunk."""


class Work(NamedTuple):
    """Something that is run by one compiled program, again and again."""

    shape: PassShape | int
    """Of a pass; of a decode step, its rows."""
    policy: Hashable = None

    @property
    def is_step(self) -> bool:
        return isinstance(self.shape, int)

    @property
    def packs(self) -> bool:
        """Whether it is a pass over several prompts."""
        return isinstance(self.shape, PassShape) and self.shape.length is not None

    @property
    def size(self) -> int:
        """Tokens that go through the model."""
        return self.shape if isinstance(self.shape, int) else self.shape.tokens


@dataclass(kw_only=True)
class Costs:
    """Seconds that things took lately, and what is expected of others from them."""

    seen: dict[Work, float] = field(default_factory=dict)
    """Of a pass or of a step, without compiling. What is here is compiled."""
    compiling: float = 0.0
    """Of a program, on average."""
    compiled: int = 0
    """Programs that this is the average of."""
    missed: dict[Work, float] = field(default_factory=dict)
    """What programs that aren't compiled would have saved so far."""

    def note(self, work: Work, seconds: float, compiling: float = 0.0) -> None:
        """A pass, or a step on average, took so long, after compiling for so long."""
        before = self.seen.get(work)
        self.seen[work] = seconds if before is None else (3 * before + seconds) / 4
        if compiling > 0:
            self.compiled += 1
            self.compiling += (compiling - self.compiling) / self.compiled

    def of(self, work: Work) -> float:
        """Seconds; where not seen, in proportion to those of the nearest size of the same kind, but for what a pass
        costs whatever its size; 0: none was seen."""
        if work in self.seen:
            return self.seen[work]
        like = [other for other in self.seen if other.is_step == work.is_step]
        if not like:
            return 0.0
        nearest = min(like, key=lambda other: (abs(other.size - work.size), other.policy != work.policy))
        fixed = 0.0 if work.is_step else min(self.overhead, self.seen[nearest])
        return fixed + (self.seen[nearest] - fixed) * work.size / nearest.size

    def prefers(self, one: Work, others: Iterable[Work], *, times: int = 1) -> bool:
        """Whether one program is better run, so many times, than several others, one after the other.

        Where only one of the two ways would have to be compiled, it is once it would have saved by now what compiling
        takes: so what is lost, by compiling in vain or too late, is never more than twice what was needed.
        """
        others = list(others)
        new = {other for other in others if other not in self.seen}
        saves = times * (sum(map(self.of, others)) - self.of(one))
        if (one in self.seen) == (not new):
            return saves > 0 or not self.seen
        if one in self.seen:
            return saves >= 0 or not self._pays(new.pop(), -saves)
        return saves > 0 and self._pays(one, saves)

    def _pays(self, work: Work, saves: float) -> bool:
        """Whether what isn't compiled would have saved enough, with what it would now."""
        self.missed[work] = self.missed.get(work, 0.0) + saves
        return self.missed[work] >= self.compiling

    @property
    def overhead(self) -> float:
        """Seconds of a pass that don't depend on its tokens, about: those of the shortest step."""
        return min((seconds for work, seconds in self.seen.items() if work.is_step), default=0.0)


def width(rows: int) -> int:
    """Of a decode step for so many: 1, 2, 3, 4, 6, 8, 12, …: few widths, of which no row in three is idle."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power
