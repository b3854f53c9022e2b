"""Who has the rows of a cache, and what memory they hold and will."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from jaxkv.cache.config import CacheConfig
from jaxkv.engine.block_counts import BlockCounts, Blocks
from jaxkv.engine.decisions import Joining
from jaxkv.engine.reading import PromptInProgress, Reading
from jaxkv.engine.refusals import parts_too_large, too_large
from jaxkv.engine.schedule import STEPS, Schedule
from jaxkv.engine.sequence import Sequence as Answer

HORIZON = 4 * STEPS
"""Tokens that an answer is expected to go on for at least, where it isn't sooner at its limit."""


class Residents:
    """The first rows of a cache of these sizes: who answers, whose prompt is being read, and what they will take."""

    def __init__(self, config: CacheConfig, rows: int, schedule: Schedule):
        self.config, self.schedule = config, schedule
        self.counts = BlockCounts(config)
        self.rows: list[Answer | None] = [None] * rows
        self.reading: Reading | None = None
        self.aside: list[PromptInProgress] = []
        """Prompts of which little is left to read, which is read with others' rests."""
        self.stopped = self.stopped_tokens = 0
        """Answers that ended before their limits, and their tokens."""

    def sequence(self, row: int) -> Answer:
        """That of a row that is taken."""
        sequence = self.rows[row]
        assert sequence is not None
        return sequence

    @property
    def running(self) -> list[int]:
        """Rows that decode: all taken but those whose prompts are being read."""
        reading = {row for prompt in self._unfinished for row in prompt.rows}
        return [row for row, sequence in enumerate(self.rows) if sequence is not None and row not in reading]

    def with_others(self, rows: Sequence[int], width: int) -> np.ndarray:
        """``i32[width]``: these rows, and then as many others as it takes, each once."""
        taken = set(rows)
        others = (row for row in range(len(self.rows)) if row not in taken)
        return np.array([*rows, *islice(others, width - len(rows))], np.int32)

    def too_large(self, row: int) -> str | None:
        """Why an answer can't be given to a prompt that is read and compressed; None where it can."""
        request = self.sequence(row).request
        return too_large(self.config, self.counts, row, request, self._growth([row], request.until_compressed))

    def parts_too_large(self, prompt: PromptInProgress) -> str | None:
        """Why the next part can't be read beside what is left of those before; None where it can."""
        return parts_too_large(self.config, self.counts, prompt)

    def expected(self, sequence: Answer) -> int:
        """Tokens, about, that an answer will still hold memory for: more join only where there is room for these, or
        somebody would soon be put back and read again."""
        policy, left = sequence.request.policy, sequence.tokens_left
        if sequence.ends:  # as long as others were
            usual = self.stopped_tokens // self.stopped if self.stopped else 0
            left = min(left, max(usual - sequence.replayed, sequence.replaying + HORIZON))
        if policy is not None and policy.compress_every is not None:
            left = min(left, max(policy.compress_every, HORIZON))
        return left

    def _fit(self, prompts: Sequence[Joining], grows: Blocks, free: Blocks) -> bool:
        """Whether so many blocks suffice for these prompts, all read before any is compressed, and then for the answers
        to their ends, beside those who are answering and grow by so much. Alone, a prompt must only be read."""
        takes = sum((joining.takes for joining in prompts), Blocks())
        if len(prompts) == 1 and self.rows.count(None) == len(self.rows):
            return takes <= free
        leave = sum((joining.leaves for joining in prompts), Blocks())
        need = takes.or_more(leave) + grows if self.schedule.alternates else takes.or_more(leave + grows)
        return need <= free

    def _growth(self, rows: Sequence[int], tokens: int) -> Blocks:
        """What these rows allocate for at most so many more tokens each."""
        return self._growth_by(rows, [min(tokens, self.sequence(row).tokens_left) for row in rows])

    def _growth_of_answers(self) -> Blocks:
        """What those who are answering are expected to allocate."""
        running = self.running
        return self._growth_by(running, [self.expected(self.sequence(row)) for row in running])

    def _growth_by(self, rows: Sequence[int], tokens: Sequence[int]) -> Blocks:
        return self.counts.growth(rows, [self.sequence(row).request.policy for row in rows], tokens)

    @property
    def _unfinished(self) -> list[PromptInProgress]:
        """Prompts that aren't read to their ends."""
        return [*self.aside, *([] if self.reading is None else self.reading.prompts)]

    def _unread(self) -> Blocks:
        """What the rest of the prompts being read, and their compression, may still take."""
        return sum((prompt.most - self.counts.held(prompt.row) for prompt in self._unfinished), Blocks())

    def _still_take(self, prompts: Iterable[PromptInProgress]) -> Blocks:
        """What prompts that are being read may still take, and then their answers."""
        return sum((each.most.or_more(each.leaves) - self.counts.held(each.row) for each in prompts), Blocks())
