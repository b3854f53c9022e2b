"""What the scheduler says about those who wait."""

from __future__ import annotations

from dataclasses import dataclass

from jaxkv.engine.block_counts import Blocks
from jaxkv.engine.costs import PassShape
from jaxkv.engine.prefixes import Share, SharedPrefix
from jaxkv.engine.prompt_plan import PromptPlan
from jaxkv.engine.reading import PromptInProgress
from jaxkv.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Joining:
    """A request gets a row, and its prompt is read."""

    sequence: Sequence
    row: int
    plan: PromptPlan
    share: Share
    takes: Blocks
    """That it allocates until it is compressed; what it borrows isn't among them."""
    leaves: Blocks
    """That it will hold at its end."""
    forks: tuple[int, ...] = ()
    """Rows for those that answer the same prompt."""

    @property
    def unread(self) -> int:
        """Tokens of its prompt that it doesn't borrow."""
        return len(self.sequence.request.prompt) - self.share.borrow_tokens


@dataclass(frozen=True, kw_only=True)
class Join:
    """The first in the queue is read, perhaps with others that wait; or only what is left of prompts."""

    prompts: tuple[Joining, ...]
    rests: tuple[PromptInProgress, ...] = ()
    """Prompts of which the rest is read in the same pass."""
    shape: PassShape
    cut: tuple[SharedPrefix, ...] = ()
    """Prefixes whose unused blocks go before."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Nobody joins now."""

    cut: tuple[SharedPrefix, ...] = ()
    """Prefixes whose unused blocks go."""
