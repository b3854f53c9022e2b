"""Prompts that start alike: which prefix they share, who borrows it, and what of it may go. Host side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxkv.cache.prefix import Prefix
from jaxkv.generation.prompt import observation_of
from jaxkv.requests import Request

LEAST_SHARED = 128
"""Tokens: a shorter prefix isn't worth its bookkeeping."""
AHEAD = 4
"""Requests to look at beyond those that there are rows for."""


@dataclass(kw_only=True, eq=False)
class Kept:
    """A prefix in the pool."""

    tokens: np.ndarray
    """``i32[blocks * block_size]``."""
    prefix: Prefix
    """Its block table, on the host."""
    borrowed: dict[int, int] = field(default_factory=dict)
    """Blocks of each head, by the row that borrows them."""

    @property
    def blocks(self) -> int:
        return int(self.prefix.blocks)

    @property
    def in_use(self) -> int:
        return max(self.borrowed.values(), default=0)


def choose(
    prefixes: Sequence[Kept], request: Request, waiting: Iterable[Request], block_size: int
) -> tuple[Kept | None, int, int]:
    """What a request borrows and lends, in blocks of each head: the prefix and how much of it, and how much it lends.

    It lends what it has most in common with one that waits, rather than borrow, where that is more than twice as much:
    then the other saves more than this one reads again.
    """
    mine = request.prompt[: readable(request)]
    borrowed = [_whole(_common(kept.tokens, mine), block_size) for kept in prefixes]
    most = max(borrowed, default=0)
    common = max((_common(mine, other.prompt[: readable(other)]) for other in waiting), default=0)
    lend = _whole(common, block_size)
    if lend > 2 * most:
        return None, 0, lend
    return (prefixes[borrowed.index(most)], most, 0) if most else (None, 0, 0)


def readable(request: Request) -> int:
    """Tokens that a request may leave to others to read: all but the last, and but those that its policy observes.

    A policy that observes all queries, or expects others like them, reads its whole prompt itself.
    """
    return observation_of(request.policy).shareable(len(request.prompt))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _whole(tokens: int, block_size: int) -> int:
    return tokens // block_size if tokens >= LEAST_SHARED else 0
