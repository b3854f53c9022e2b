"""Prompts that start alike: which prefix they share, who borrows it, and what of it may go. Host side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from jaxkv.cache.prefix import Prefix
from jaxkv.engine.block_counts import Blocks
from jaxkv.generation.prompt import observation_of
from jaxkv.requests import Request

LEAST_SHARED = 128
"""Tokens: a shorter prefix isn't worth its bookkeeping."""
AHEAD = 4
"""Requests to look at beyond those that there are rows for."""


@dataclass(kw_only=True, eq=False)
class SharedPrefix:
    """A prefix in the pool."""

    tokens: np.ndarray
    """``i32[blocks * block_size]``."""
    prefix: Prefix
    """Its block table, on the host."""
    borrowed: dict[int, int] = field(default_factory=dict)
    """Blocks of each head, by the row that borrows them."""

    @property
    def blocks(self) -> int:
        """Of each head."""
        return int(self.prefix.blocks)

    @property
    def in_use(self) -> int:
        """Blocks of each head that somebody borrows."""
        return max(self.borrowed.values(), default=0)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a prompt begins with, and what of it others will; both in whole blocks."""

    prefix: SharedPrefix | None = None
    borrow_tokens: int = 0
    """Of the prefix, from its beginning on."""
    lend_tokens: int = 0
    """They become a prefix once they are read; 0: none do."""


class Prefixes:
    """All prefixes that are in the pool."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self._all: list[SharedPrefix] = []

    def __iter__(self) -> Iterator[SharedPrefix]:
        return iter(self._all)

    def share_for(self, request: Request, waiting: Iterable[Request]) -> Share:
        """What a request borrows or lends.

        It lends what it has most in common with one that waits, rather than borrow, where that is more than twice as
        much: then the other saves more than this one reads again.
        """
        mine = request.prompt[: readable(request)]
        if len(mine) < LEAST_SHARED:
            return Share()
        borrow = self._borrowable(mine)
        most = max(borrow, default=0)
        lend = self._whole(max((_common(mine, other.prompt[: readable(other)]) for other in waiting), default=0))
        if lend > 2 * most:
            return Share(lend_tokens=lend)
        return Share(prefix=self._all[borrow.index(most)], borrow_tokens=most) if most else Share()

    def borrowable(self, request: Request) -> int:
        """Tokens that a request could borrow at most."""
        return max(self._borrowable(request.prompt[: readable(request)]), default=0)

    def borrow(self, row: int, share: Share) -> None:
        """A row begins with what its prompt borrows."""
        if share.prefix is not None:
            share.prefix.borrowed[row] = share.borrow_tokens // self.block_size

    def lend(self, row: int, tokens: np.ndarray, prefix: Prefix) -> None:
        """What a row holds, of these tokens, becomes a prefix, which the row only borrows from now on."""
        shared = SharedPrefix(tokens=tokens, prefix=prefix)
        shared.borrowed[row] = shared.blocks
        self._all.append(shared)

    def give_up(self, row: int) -> bool:
        """A row borrows no longer; False where it did not."""
        lenders = [shared for shared in self._all if row in shared.borrowed]
        for shared in lenders:
            del shared.borrowed[row]
        return bool(lenders)

    def unused(self, *, but: SharedPrefix | None = None) -> tuple[SharedPrefix, ...]:
        """Those of which something may go, but for one."""
        return tuple(shared for shared in self._all if shared is not but and shared.in_use < shared.blocks)

    def cut(self, shared: SharedPrefix, left: Prefix) -> None:
        """Notes what is left of a prefix."""
        shared.prefix = left
        shared.tokens = shared.tokens[: shared.blocks * self.block_size]
        if shared.blocks == 0:
            self._all.remove(shared)

    def _borrowable(self, mine: np.ndarray) -> list[int]:
        """Of each prefix, the tokens that these begin with."""
        return [self._whole(_common(shared.tokens, mine)) for shared in self._all]

    def _whole(self, tokens: int) -> int:
        return tokens - tokens % self.block_size if tokens >= LEAST_SHARED else 0


def freed_by(cut: Iterable[SharedPrefix], heads: int) -> Blocks:
    """What comes back of prefixes that are cut to what is in use."""
    return Blocks(raw=heads * sum(shared.blocks - shared.in_use for shared in cut))


def on_host(prefix: Prefix) -> Prefix:
    """Read back; of one that several processes share only how long it is."""
    whole = prefix.table.is_fully_addressable
    return jax.device_get(prefix) if whole else replace(prefix, blocks=jax.device_get(prefix.blocks))


def readable(request: Request) -> int:
    """Tokens that a request may leave to others to read."""
    return observation_of(request.policy).shareable(len(request.prompt))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
