"""Whose attention a scorer is shown of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Nobody's: base of the others."""

    buffer: int = 0
    """A query tells nothing of keys less than so many tokens before it (KV-Compress, section 3, ``v``)."""

    watches: ClassVar[bool] = False
    """Whether attention to each KV is added up."""
    rereads: ClassVar[bool] = False
    """Whether that is of a second reading, of the prompt as if it came again after itself."""
    expects: ClassVar[bool] = False
    """Whether attention is that of queries to expect."""
    adds_up: ClassVar[bool] = False
    """Whether what a further part of the prompt, or a further prompt, pays to old KVs adds to the scores that they
    have; else it replaces them."""

    def rows(self, positions: Array, counts: Array, end: Array) -> Array | None:
        """Which of a chunk's queries are observed while it is read, ``i32[batch, observed]``, -1 for none.

        Args:
          positions: ``i32[batch, chunk]``.
          counts: ``i32[batch]`` real tokens of the chunk.
          end: ``i32[batch]`` position after the prompt's last token.
        """
        return None

    def shareable(self, tokens: int) -> int:
        """How many of a prompt's first tokens others may read for it: the last one's logits are its own affair."""
        return max(tokens - 1, 0)


@dataclass(frozen=True, kw_only=True)
class Nothing(Observation):
    """No attention is observed."""


@dataclass(frozen=True, kw_only=True)
class LastQueries(Observation):
    """The prompt's last queries."""

    count: int
    watches: ClassVar[bool] = True

    def rows(self, positions: Array, counts: Array, end: Array) -> Array:
        batch, chunk = positions.shape
        if self.count < chunk:
            rows = (end - self.count - positions[:, 0])[:, None] + jnp.arange(self.count, dtype=jnp.int32)
            return jnp.where((rows >= 0) & (rows < counts[:, None]), rows, -1)
        rows = jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32), (batch, chunk))
        return jnp.where((rows < counts[:, None]) & (positions >= end[:, None] - self.count), rows, -1)

    def shareable(self, tokens: int) -> int:
        return max(tokens - self.count, 0)


@dataclass(frozen=True, kw_only=True)
class AllQueries(Observation):
    """All of the prompt's queries."""

    watches: ClassVar[bool] = True
    adds_up: ClassVar[bool] = True

    def rows(self, positions: Array, counts: Array, end: Array) -> Array:
        rows = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=jnp.int32), positions.shape)
        return jnp.where(rows < counts[:, None], rows, -1)

    def shareable(self, tokens: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Reread(Observation):
    """The prompt is read once more, after itself and uncached, and all queries of that reading are observed."""

    watches: ClassVar[bool] = True
    rereads: ClassVar[bool] = True
    adds_up: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ExpectedQueries(Observation):
    """Not queries that were made but those to expect, like the prompt's own, at the next positions; a policy's
    ``sinks`` are left out on either side. The model must have ``rotation`` (``models.Rotary``)."""

    count: int
    """Positions after the prompt."""
    expects: ClassVar[bool] = True

    def shareable(self, tokens: int) -> int:
        return 0
