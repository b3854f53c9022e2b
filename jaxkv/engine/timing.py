"""Seconds of what the engine does, compiling apart."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from jaxkv.engine.programs import Programs
from jaxkv.engine.sequence import Sequence


@contextmanager
def timed(programs: Programs, phase: str, sequences: Iterable[Sequence]) -> Iterator[dict[str, float]]:
    """Adds what happens inside to the sequences' timings, and tells at the end; compiling is a phase of its own."""
    seconds: dict[str, float] = {}
    began, compiled = time.perf_counter(), programs.compile_seconds
    yield seconds
    seconds["compile"] = programs.compile_seconds - compiled
    seconds[phase] = time.perf_counter() - began - seconds["compile"]
    for sequence in sequences:
        sequence.timings.add(seconds)
