"""Decode steps that were sent to the device and not yet received."""

from __future__ import annotations

from dataclasses import dataclass

from jaxkv.engine.costs import Work
from jaxkv.engine.programs import Steps
from jaxkv.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """What was asked for, and what will come."""

    rows: list[int]
    sequences: list[Sequence]
    """Those that the rows had then."""
    place: list[int]
    """Of each in what the program takes and gives."""
    steps: int
    """At most."""
    work: Work
    made: Steps
    """Promised; its cache has been given away."""
    looks: int
    """How often the engine had looked at the cache by itself: if it has since, it saw later counts."""
    began: float
    compiling: float
    """Seconds."""
    follows: bool
    """It was sent before the steps before it were received."""
