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

    def rows(self) -> list[tuple[list[int], list[float]]]:
        """Of each row: tokens and their log probabilities."""
        each = zip(self.tokens.tolist(), self.logprobs.tolist(), self.counts.tolist(), strict=True)
        return [(tokens[:count], logprobs[:count]) for tokens, logprobs, count in each]

    def top(self, at: int, top: int) -> list[dict[int, float]]:
        """Of one row at each place the ``top`` likeliest tokens, with their log probabilities."""
        if not top:
            return []
        likeliest, theirs = (
            part[at, : self.counts[at], :top].tolist() for part in (self.likeliest, self.their_logprobs)
        )
        return [dict(zip(*both, strict=True)) for both in zip(likeliest, theirs, strict=True)]


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
