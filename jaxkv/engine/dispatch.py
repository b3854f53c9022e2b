"""Decode steps that were sent to the device and not yet received."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxkv.engine.costs import Work
from jaxkv.engine.programs import Steps
from jaxkv.engine.sequence import Sequence


class Made(NamedTuple):
    """Tokens of some rows, of each the first ``counts``; on the device until they are fetched."""

    tokens: Any
    """``i32[n, steps]``."""
    logprobs: Any
    """``f32[n, steps]``."""
    likeliest: Any
    """``i32[n, steps, top]``."""
    their_logprobs: Any
    """``f32[n, steps, top]``."""
    counts: Any
    """``i32[n]``."""

    @classmethod
    def of_steps(cls, steps: Steps) -> Made:
        return cls(steps.tokens, steps.logprobs, steps.likeliest, steps.their_logprobs, steps.counts)

    @classmethod
    def of_first(cls, chosen: list[np.ndarray]) -> Made:
        """Of what ``generation.sampling.Chosen`` holds, fetched: one token each."""
        tokens, logprobs, likeliest, theirs = (part[:, None] for part in chosen)
        return cls(tokens, logprobs, likeliest, theirs, np.ones(len(tokens), np.int32))

    def row(self, at: int, top: int) -> tuple[list[int], list[float], list[dict[int, float]]]:
        """Of one row: tokens, their log probabilities, and at each place those of the ``top`` likeliest."""
        count = int(self.counts[at])
        likeliest, theirs = (part[at, :count, :top].tolist() for part in (self.likeliest, self.their_logprobs))
        top_logprobs = [dict(zip(*both, strict=True)) for both in zip(likeliest, theirs, strict=True)] if top else []
        return self.tokens[at, :count].tolist(), self.logprobs[at, :count].tolist(), top_logprobs


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
