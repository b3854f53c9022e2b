"""A prompt that is being read: in parts, and each part in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jaxkv.engine.block_counts import Blocks
from jaxkv.engine.sequence import Sequence
from jaxkv.generation.prefill import CHUNK

if TYPE_CHECKING:
    from jaxkv.generation.prefill import PromptState


@dataclass(kw_only=True)
class PromptInProgress:
    """How far one is read, and what it may still take."""

    row: int
    sequence: Sequence
    part: int
    """Tokens of a part."""
    read: int
    """Tokens, borrowed ones included."""
    lend_tokens: int
    """The first that become a prefix once they are read; 0: none do."""
    most: Blocks
    """That its row holds until it is compressed, what it borrows and lends included."""
    chunk: int = field(init=False)
    """Tokens of a chunk, the last one padded: one program serves all."""
    state: PromptState = field(init=False)
    """Of its present part; the engine's."""

    def __post_init__(self) -> None:
        self.chunk = _chunk_size(self.part_length)

    @property
    def ids(self) -> np.ndarray:
        """``i32[total]``."""
        return self.sequence.request.prompt

    @property
    def total(self) -> int:
        return len(self.ids)

    @property
    def part_length(self) -> int:
        """Tokens of the part that begins here."""
        return min(self.part, self.total - self.read)

    @property
    def part_is_read(self) -> bool:
        return self.read == self.total or self.read % self.part == 0

    def next_chunk(self) -> tuple[np.ndarray, int]:
        """``i32[1, chunk]`` and how many of them are real; it ends where the part does, or what is lent."""
        stop = min((self.read // self.part + 1) * self.part, self.total)
        if self.read < self.lend_tokens:
            stop = self.lend_tokens
        return _padded(self.ids[self.read : stop], self.chunk)

    def part_again(self) -> Iterator[tuple[np.ndarray, int]]:
        """Chunks of the whole part that was just read, which don't follow from what was borrowed."""
        size = _chunk_size(self.part)
        for at in range((self.read - 1) // self.part * self.part, self.read, size):
            yield _padded(self.ids[at : self.read], size)


def _chunk_size(tokens: int) -> int:
    return min(CHUNK, -(-tokens // 64) * 64)


def _padded(ids: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """The first of these tokens, ``i32[1, size]``, and how many are real."""
    tokens, count = np.zeros((1, size), np.int32), min(len(ids), size)
    tokens[0, :count] = ids[:count]
    return tokens, count
