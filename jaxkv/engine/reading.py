"""Prompts that are being read: one in parts, and each part in chunks; or the rests of several together, at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jaxkv.engine.block_counts import Blocks
from jaxkv.engine.costs import PassShape
from jaxkv.engine.sequence import Sequence
from jaxkv.generation.prefill import CHUNK
from jaxkv.policies import Policy

if TYPE_CHECKING:
    from jaxkv.generation.prefill import PromptState

LONGEST_TOGETHER = CHUNK // 2
"""Tokens of a prompt that is read with others at most: of longer ones, one fills a chunk nearly as well."""
SMALLEST_TOGETHER = 64
"""Tokens that a prompt is counted as at least."""
MOST_TOGETHER = 2 * CHUNK // SMALLEST_TOGETHER
"""Prompts of a pass at most."""


@dataclass(kw_only=True, eq=False)
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
    leaves: Blocks
    """That it will hold at its end."""
    state: PromptState | None = None
    """Of what is read, where the rest waits for others; the engine's."""

    @property
    def ids(self) -> np.ndarray:
        """``i32[total]``."""
        return self.sequence.request.prompt

    @property
    def total(self) -> int:
        return len(self.ids)

    @property
    def unread(self) -> int:
        """Tokens."""
        return self.total - self.read

    @property
    def part_length(self) -> int:
        """Tokens of the part that begins here."""
        return min(self.part, self.unread)

    @property
    def part_is_read(self) -> bool:
        return self.read == self.total or self.read % self.part == 0

    @property
    def waits_for_others(self) -> bool:
        """Whether what is left of it goes into a pass with others' rests."""
        whole, lent = self.part >= self.total, self.read >= self.lend_tokens
        return whole and lent and 0 < self.unread <= LONGEST_TOGETHER

    @property
    def next_ids(self) -> np.ndarray:
        """The tokens from here to the end of the part, or of what is lent."""
        stop = min((self.read // self.part + 1) * self.part, self.total)
        return self.ids[self.read : self.lend_tokens if self.read < self.lend_tokens else stop]


@dataclass(kw_only=True)
class Reading:
    """What is read now: one prompt, or all that is left of several of the same policy in one pass."""

    prompts: list[PromptInProgress]
    shape: PassShape
    rows: np.ndarray
    """``i32[shape.rows]``: the prompts' rows first, then others, of which nothing is read."""
    state: PromptState = field(init=False)
    """Of the present part; the engine's."""

    @property
    def policy(self) -> Policy | None:
        return self.prompts[0].sequence.request.policy

    @property
    def sequences(self) -> list[Sequence]:
        return [prompt.sequence for prompt in self.prompts]

    @property
    def part_lengths(self) -> np.ndarray:
        """``i32[shape.rows]``."""
        return self._of_rows([prompt.part_length for prompt in self.prompts])

    @property
    def least_shape(self) -> PassShape:
        """Of the next chunk, if it is padded no more than it must be."""
        if self.shape.length is not None:
            return self.shape
        return shape_alone(min(len(self.prompts[0].next_ids), self.shape.tokens))

    def next_chunk(self, shape: PassShape) -> tuple[np.ndarray, np.ndarray]:
        """``i32[1, shape.tokens]``, and how many of each row are in it, ``i32[shape.rows]``."""
        ids = [prompt.next_ids[: shape.tokens] for prompt in self.prompts]
        return _padded(ids, shape.tokens), self._of_rows(list(map(len, ids)))

    def part_again(self) -> Iterator[tuple[int | None, np.ndarray, np.ndarray]]:
        """Chunks of the whole parts that were just read, which don't follow from what was borrowed: the place of the
        prompt that each is of, and tokens and counts as of a chunk; place None: all that go into one pass."""
        for place, prompt in enumerate(self.prompts):
            if self.shape.length is not None and prompt.total <= self.shape.length:
                continue
            size = chunk_size(prompt.part)
            for at in range((prompt.read - 1) // prompt.part * prompt.part, prompt.read, size):
                ids = prompt.ids[at : min(at + size, prompt.read)]
                yield place, _padded([ids], size), np.array([len(ids)], np.int32)
        if self.shape.length is not None:
            short = [p.ids if p.total <= self.shape.length else p.ids[:0] for p in self.prompts]
            if any(map(len, short)):
                yield None, _padded(short, self.shape.tokens), self._of_rows(list(map(len, short)))

    def of_prompts(self, values: np.ndarray) -> Iterator[tuple[PromptInProgress, int]]:
        """The prompts, each with its row's value."""
        return zip(self.prompts, values.tolist(), strict=False)

    def _of_rows(self, values: list[int]) -> np.ndarray:
        return np.array([*values, *[0] * (self.shape.rows - len(values))], np.int32)


def shape_alone(tokens: int) -> PassShape:
    """Of the chunks of a prompt, or a part, of so many tokens."""
    return PassShape(chunk_size(tokens))


def shape_together(lengths: list[int], rows: int) -> PassShape | None:
    """Of a pass over several prompts, of which there is a row for each; None: they don't go into one."""
    tokens, longest = sum(lengths), max(lengths)
    if tokens > CHUNK or longest > LONGEST_TOGETHER or min(lengths) == 0:
        return None
    size = max(_power_of_two(tokens), 2 * SMALLEST_TOGETHER)
    length = max(_power_of_two(longest), SMALLEST_TOGETHER)
    most = min(2 * size // length, rows)
    return PassShape(size, most, length) if len(lengths) <= most else None


def last_together(tokens: int) -> int:
    """Of a prompt's unread tokens, those that may be read with others: all of a short one, the last chunk of a long
    one; ``shape_together`` says whether they can."""
    return tokens if tokens <= LONGEST_TOGETHER else tokens % CHUNK


def chunk_size(tokens: int) -> int:
    """Tokens of a chunk, the last one padded: one program serves all of a prompt."""
    return min(CHUNK, -(-tokens // 64) * 64)


def _padded(ids: list[np.ndarray], size: int) -> np.ndarray:
    tokens, together = np.zeros((1, size), np.int32), np.concatenate(ids)
    tokens[0, : len(together)] = together
    return tokens


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
