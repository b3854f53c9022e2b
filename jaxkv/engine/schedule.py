"""What goes first, prompts or answers: strategies of the scheduler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf

from jaxkv.checks import check_numbers, shown

STEPS = 16
"""Decode steps in one dispatch at most."""
FEW_STEPS = 4
"""Steps that a dispatch is worth, and of one where nobody may wait long while it isn't known what a step costs."""


class Schedule(ABC):
    """How long answers and prompts wait for each other."""

    @property
    @abstractmethod
    def alternates(self) -> bool:
        """Whether those who are answering go on after each chunk of a prompt."""

    @abstractmethod
    def steps(self, step: float | None, chunk: float, soonest: int | None) -> int:
        """Decode steps of a dispatch, 1 to ``STEPS``.

        Args:
          step: seconds of one; None: not known yet.
          chunk: seconds of the chunk that is read before each dispatch; 0 where nothing is read.
          soonest: steps until the first of those who are answering surely ends, where somebody waits for its place.
        """

    @abstractmethod
    def joins(self, idle: float, saves: float) -> bool:
        """Whether prompts that could be read are, though they would be read with others later, which saves so many
        seconds; rows that could have been theirs have stood idle for what cost ``idle``."""


@dataclass(frozen=True, kw_only=True)
class Throughput(Schedule):
    """Whoever finds a row and room is read first, and answers go on when nobody does: for jobs.

    So that as many as can be are decoded together. Prompts wait for others to be read with, but no longer than that
    saves.
    """

    @property
    def alternates(self) -> bool:
        return False

    def steps(self, step: float | None, chunk: float, soonest: int | None) -> int:
        return STEPS if soonest is None else min(STEPS, max(soonest, FEW_STEPS))

    def joins(self, idle: float, saves: float) -> bool:
        return idle >= saves


@dataclass(frozen=True, kw_only=True)
class Latency(Schedule):
    """A chunk of a prompt and a few steps take turns, so that nobody who is answering waits long: for streams.

    Args:
      seconds: that may pass until the next tokens; where a chunk and a step take longer, it is as long as they take.

    Raises:
      ValueError: seconds that aren't positive.
    """

    seconds: float = 0.25

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 < self.seconds < inf:
            raise ValueError(f"seconds must be positive, got {shown(self.seconds)}")

    @property
    def alternates(self) -> bool:
        return True

    def steps(self, step: float | None, chunk: float, soonest: int | None) -> int:
        if step is None:
            return FEW_STEPS
        return min(max(int((self.seconds - chunk) / max(step, 1e-9)), 1), STEPS)

    def joins(self, idle: float, saves: float) -> bool:
        return True
