"""Who joins, what is decoded, who makes room: decided from counts on the host; the engine carries it out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from jaxkv.cache.config import CacheConfig
from jaxkv.engine.block_counts import BlockCounts, Blocks
from jaxkv.engine.prefixes import AHEAD, Prefixes, Share, SharedPrefix
from jaxkv.engine.prompt_plan import PromptPlan, Unservable, more_memory
from jaxkv.engine.reading import PromptInProgress
from jaxkv.engine.sequence import Sequence
from jaxkv.policies import Policy
from jaxkv.requests import Refused

STEPS = 16
"""Decode steps in one dispatch: what a stream waits for."""
STEPS_WHILE_READING = 4
"""The same between two chunks of a prompt: the sooner it is read, the more are decoded together."""
HORIZON = 4 * STEPS
"""Tokens that each running sequence must still have room for when another joins; else it would soon be put back."""


@dataclass(frozen=True, kw_only=True)
class Join:
    """The first in the queue gets a row, and its prompt is read."""

    row: int
    plan: PromptPlan
    share: Share
    takes: Blocks
    """That it allocates until it is compressed; what it borrows isn't among them."""
    cut: tuple[SharedPrefix, ...] = ()
    """Prefixes whose unused blocks go before."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Nobody joins now."""

    cut: tuple[SharedPrefix, ...] = ()
    """Prefixes whose unused blocks go."""


class Scheduler:
    """The rows of a cache, and what waits for one. Decisions change nothing; ``join``, ``leave`` and the like do.

    Args:
      config: the cache's sizes; its batch is the number of rows.
      share_prefixes: whether prompts that start alike are looked for, and read once.
    """

    def __init__(self, config: CacheConfig, *, share_prefixes: bool = True):
        self.config, self.share_prefixes = config, share_prefixes
        self.counts = BlockCounts(config)
        self.prefixes = Prefixes(config.block_size)
        self.rows: list[Sequence | None] = [None] * config.batch
        self.queue: deque[Sequence] = deque()
        self.reading: PromptInProgress | None = None
        self.joined = self.preemptions = 0
        self.locked = False
        """After a preemption nobody joins until somebody leaves: else the two would take turns for ever."""

    def sequence(self, row: int) -> Sequence:
        """That of a row that is taken."""
        sequence = self.rows[row]
        assert sequence is not None
        return sequence

    @property
    def running(self) -> list[int]:
        """Rows that decode: all taken but the one whose prompt is being read."""
        reading = self.reading.row if self.reading is not None else None
        return [row for row, sequence in enumerate(self.rows) if sequence is not None and row != reading]

    @property
    def wants_requests(self) -> bool:
        """Whether there are fewer in the queue than could get a row, or may share a prefix with one that does."""
        return len(self.queue) < self.rows.count(None) + (AHEAD if self.share_prefixes else 0)

    def next(self) -> Join | Wait | Refused:
        """What to do about the first in the queue; it joins where its whole prompt fits beside what others soon need.

        One prompt is read at a time.
        """
        if not self.queue or self.reading is not None or self.locked:
            return Wait()
        sequence, running = self.queue[0], self.running
        plan, policy = sequence.plan, sequence.request.policy
        if isinstance(plan, Unservable):
            return Refused(request=sequence.index, error=plan.reason)
        if None not in self.rows:
            return Wait()
        row, share = self.rows.index(None), self._share(sequence, plan)
        takes = self._takes(sequence, plan, share)
        need = takes + self._growth(running, HORIZON)
        if policy is None and running:
            need += Blocks(raw=self.config.full_blocks(min(HORIZON, sequence.request.limit)))
        if need <= self.counts.free:
            return Join(row=row, plan=plan, share=share, takes=takes)
        cut = self.prefixes.unused(but=share.prefix)
        if need <= self.counts.free + self._freed_by(cut):
            return Join(row=row, plan=plan, share=share, takes=takes, cut=cut)
        # Where nobody runs, nothing but prefixes is in its way, also the one that it would have shared.
        return Wait(cut=cut if running else self.prefixes.unused())

    def join(self, join: Join) -> PromptInProgress:
        """The first in the queue gets its row."""
        sequence, share = self.queue.popleft(), join.share
        self.rows[join.row] = sequence
        self.joined += 1
        sequence.begin(order=self.joined)
        self.prefixes.borrow(join.row, share)
        self.reading = PromptInProgress(
            row=join.row,
            sequence=sequence,
            part=join.plan.part,
            read=share.borrow_tokens,
            lend_tokens=share.lend_tokens,
            most=join.takes + Blocks(raw=self.config.full_blocks(share.borrow_tokens)),
        )
        return self.reading

    def too_large(self, row: int) -> str | None:
        """Why an answer can't be given to a prompt that is read and compressed; None where it can."""
        counts, total, request = self.counts, self.counts.total, self.sequence(row).request
        if self.config.tiers is not None and counts.left_unquantised(row, request.policy):
            whole = self.config.heads * self.config.tiers.full_blocks(len(request.prompt) + request.limit)
            return (
                f"the prompt doesn't fit its {total.quantised} quantised blocks; "
                f"{more_memory(self.config, whole, quantised=True)}, a smaller budget, or shorten it"
            )
        held, more = counts.held(row), self._growth([row], request.limit)
        if held + more <= total:
            return None
        quantised = held.raw + more.raw <= total.raw
        have, grows = (held.quantised, more.quantised) if quantised else (held.raw, more.raw)
        return (
            f"the prompt holds {have} blocks once it is read, but {request.limit} more tokens may need {grows}; "
            f"{more_memory(self.config, have + grows, quantised=quantised)}, or ask for fewer tokens"
        )

    def parts_too_large(self, prompt: PromptInProgress) -> str | None:
        """Why the next part can't be read beside what is left of those before; None where it can."""
        plan, length = prompt.sequence.plan, prompt.part_length
        assert isinstance(plan, PromptPlan)
        held = self.counts.held(prompt.row).raw
        need = held + self.config.full_blocks(length)
        if need <= plan.peak_blocks:
            return None
        return (
            f"the prompt holds {held} blocks once {prompt.read} of its {prompt.total} tokens are read and compressed, "
            f"so {need} with the next part, and may hold {plan.peak_blocks}; protect less, or give more memory"
        )

    def steps(self) -> int:
        """Decode steps of all running rows that the pool surely serves in one dispatch; 0: it must have room first."""
        running, steps = self.running, STEPS if self.reading is None else STEPS_WHILE_READING
        while steps and not self._growth(running, steps) + self._unread() <= self.counts.free:
            steps //= 2
        return steps

    def dispatches(self) -> Iterable[tuple[Policy | None, list[int]]]:
        """Running rows by what their policies do in decoding; each group is decoded together."""
        alike: dict[Policy | None, list[int]] = {}
        for row in self.running:
            policy = self.sequence(row).request.policy
            alike.setdefault(policy if policy is not None and policy.acts_in_decoding else None, []).append(row)
        return alike.items()

    def whom_to_compress_again(self) -> list[int]:
        """Running rows that may have outgrown their budgets."""
        policies = {row: self.sequence(row).request.policy for row in self.running}
        return [row for row, policy in policies.items() if policy is not None and policy.compress_every is not None]

    def whom_to_put_back(self) -> int:
        """The youngest's row, also where its prompt is still being read. So the oldest always goes on."""
        taken = [(sequence.order, row) for row, sequence in enumerate(self.rows) if sequence is not None]
        return max(taken)[1]

    def put_back(self, row: int) -> None:
        """A row's sequence waits again, before all others."""
        self.queue.appendleft(self.sequence(row))
        self.leave(row)
        self.preemptions += 1
        self.locked = bool(self.running)

    def leave(self, row: int) -> None:
        """A row is free."""
        if self.reading is not None and self.reading.row == row:
            self.reading = None
        self.prefixes.give_up(row)
        self.rows[row] = None
        self.locked = False

    def _share(self, sequence: Sequence, plan: PromptPlan) -> Share:
        """What is read in parts shares nothing; what is compressed lends where the pool holds the copy, too."""
        request = sequence.request
        if not self.share_prefixes or plan.part < len(request.prompt):
            return Share()
        share = self.prefixes.share_for(request, (other.request for other in list(self.queue)[1:]))
        copied = self.config.full_blocks(share.lend_tokens) if request.policy is not None else 0
        return share if plan.peak_blocks + copied <= self.counts.total.raw else Share()

    def _takes(self, sequence: Sequence, plan: PromptPlan, share: Share) -> Blocks:
        request = sequence.request
        if request.policy is None:
            return Blocks(raw=plan.peak_blocks - self.config.full_blocks(share.borrow_tokens))
        copied = self.config.full_blocks(share.lend_tokens)
        return Blocks(raw=plan.peak_blocks + copied) + self.counts.compressed(request.policy, len(request.prompt))

    def _growth(self, rows: list[int], tokens: int) -> Blocks:
        """What these rows allocate for at most so many more tokens each."""
        total = Blocks()
        for row in rows:
            sequence = self.sequence(row)
            total += self.counts.growth(row, sequence.request.policy, min(tokens, sequence.tokens_left))
        return total

    def _unread(self) -> Blocks:
        """What the rest of the prompt being read, and its compression, may still take."""
        return Blocks() if self.reading is None else self.reading.most - self.counts.held(self.reading.row)

    def _freed_by(self, cut: Iterable[SharedPrefix]) -> Blocks:
        return Blocks(raw=self.config.heads * sum(shared.blocks - shared.in_use for shared in cut))
