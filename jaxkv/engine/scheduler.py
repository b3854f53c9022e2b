"""Who joins, what is decoded, who makes room: decided from counts on the host; the engine carries it out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from jaxkv.cache.config import CacheConfig
from jaxkv.engine.block_counts import Blocks
from jaxkv.engine.costs import Costs, PassShape, Work, width
from jaxkv.engine.decisions import Join, Joining, Wait
from jaxkv.engine.prefixes import AHEAD, Prefixes, Share, freed_by
from jaxkv.engine.prompt_plan import (
    PromptPlan,
    Unservable,
    compressed_blocks,
    forked_blocks,
    left_blocks,
    plan_parts,
)
from jaxkv.engine.reading import (
    LONGEST_TOGETHER,
    MOST_TOGETHER,
    PromptInProgress,
    Reading,
    last_together,
    shape_alone,
    shape_together,
)
from jaxkv.engine.residents import Residents
from jaxkv.engine.schedule import Schedule, Throughput
from jaxkv.engine.sequence import Sequence as Answer
from jaxkv.generation.prefill import CHUNK
from jaxkv.policies import Policy
from jaxkv.requests import Refused


class Scheduler(Residents):
    """The rows of a cache, and what waits for one. Decisions change nothing, but they note why somebody waits, and
    what programs that aren't compiled would have saved; ``join``, ``leave`` and the like do.

    Args:
      config: the cache's sizes; its batch is the number of rows.
      share_prefixes: whether prompts that start alike are looked for, and read once.
      schedule: what goes first.
      costs: what was seen of earlier runs with the same model.
      split_prompts: whether a prompt that will be compressed is read in parts where as a whole it could join only
        later; None: where its policy's scores don't depend on what follows.
      context: whether the cache's last row holds a context that requests begin with, and is nobody's.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        share_prefixes: bool = True,
        schedule: Schedule | None = None,
        costs: Costs | None = None,
        split_prompts: bool | None = None,
        context: bool = False,
    ):
        self.context_row = config.batch - 1 if context else None
        super().__init__(config, config.batch - context, schedule or Throughput())
        self.share_prefixes, self.split_prompts, self.costs = share_prefixes, split_prompts, costs or Costs()
        self.prefixes = Prefixes(config.block_size)
        self.queue: deque[Answer] = deque()
        self.joined = self.preemptions = 0
        self.idle = 0.0
        """Seconds of decoding, since somebody joined, that rows stood idle which those who wait could have had; of all
        rows together one second a second."""
        self.short_of_memory = False
        """Whether, when this was last asked, the first in the queue had a row but no room."""
        self.locked = False
        """After a preemption nobody joins until somebody leaves: else the two would take turns for ever."""

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits or has a row."""
        return not self.queue and self.rows.count(None) == len(self.rows)

    def note_decoding(self, seconds: float) -> None:
        """Rows have been decoded for so long, while others stood idle."""
        self.idle += seconds * min(self.rows.count(None), len(self.queue)) / len(self.rows)

    @property
    def wants_requests(self) -> bool:
        """Whether there are fewer in the queue than could get a row, and one more, or those that may share a prefix."""
        return len(self.queue) < self.rows.count(None) + (AHEAD if self.share_prefixes else 1)

    def next(self) -> Join | Wait | Refused:
        """What to do about the first in the queue; it joins where its whole prompt fits beside what others soon need.

        Others that wait join with it, where their prompts go into the same pass of the model and that costs less. What
        was set aside is read to its end where nobody joins whose rest is read with it.
        """
        decision = self._next_in_queue()
        if not self.aside or self.reading is not None or isinstance(decision, Refused):
            return decision
        if isinstance(decision, Join) and (decision.rests or self._cheaper_together(self.aside, decision.prompts[0])):
            return decision
        return self._rests()

    def _next_in_queue(self) -> Join | Wait | Refused:
        if not self.queue or self.reading is not None or self.locked:
            return Wait()
        sequence, running = self.queue[0], self.running
        plan = sequence.plan
        if isinstance(plan, Unservable):
            return Refused(request=sequence.index, error=plan.reason)
        if self.rows.count(None) <= len(sequence.siblings):
            return Wait()
        first, cut = self._joining(sequence, plan, self.rows.index(None)), ()
        grows, free = self._growth_of_answers(), self.counts.free - self._still_take(self.aside)
        self.short_of_memory = not self._fit([first], grows, free)
        if self.short_of_memory and (split := self._split(first, free - grows)) is not None:
            first, self.short_of_memory = split, not self._fit([split], grows, free)
        if self.short_of_memory:
            cut = self.prefixes.unused(but=first.share.prefix)
            self.short_of_memory = not self._fit([first], grows, free + freed_by(cut, self.config.heads))
            if self.short_of_memory:
                # Where nobody runs, nothing but prefixes is in its way, also the one that it would have shared.
                return Wait(cut=cut if running else self.prefixes.unused())
        join = self._together(first, grows, free + freed_by(cut, self.config.heads), bool(cut))
        if running and not self.schedule.joins(self.idle, self._saved_by_waiting(join.prompts)):
            return Wait()
        return replace(join, cut=cut)

    def set_aside(self) -> PromptInProgress | None:
        """After a chunk: the prompt that is being read, if the rest of it is read with those set aside before, or waits
        for the first in the queue, whose own rest goes into a pass with them for less."""
        reading, may_join = self.reading, None in self.rows and not self.locked
        if reading is None or self.schedule.alternates or not reading.prompts[0].waits_for_others:
            return None
        prompts = [*self.aside, reading.prompts[0]]
        if not (may_join and self._waits_for_first(prompts)) and not self._cheaper_together(prompts):
            return None
        self.aside, self.reading = prompts, None
        return prompts[-1]

    def _waits_for_first(self, prompts: list[PromptInProgress]) -> bool:
        """Whether the first in the queue has room, too, and a rest to read with these."""
        if not self.queue or isinstance(plan := self.queue[0].plan, Unservable):
            return False
        first = self._joining(self.queue[0], plan, self.rows.index(None))
        if plan.part < len(first.sequence.request.prompt) or first.sequence.siblings:
            return False
        if not self._cheaper_together(prompts, first):
            return False
        return self._fit([first], self._growth_of_answers(), self.counts.free - self._still_take(prompts))

    def _cheaper_together(self, prompts: list[PromptInProgress], *joining: Joining) -> bool:
        """Whether rests of prompts, and of those who join, of one policy, go into one pass that costs less."""
        policy, *others = [each.sequence.request.policy for each in (*prompts, *joining)]
        rests = [*(each.unread for each in prompts), *(last_together(each.unread) for each in joining)]
        shape = shape_together(rests, len(self.rows))
        if shape is None or any(other != policy for other in others):
            return False
        alone = sum(self.costs.of(Work(shape_alone(rest), policy)) for rest in rests)
        return self.costs.of(Work(shape, policy)) < alone

    def join(self, join: Join) -> Reading:
        """Those who join get their rows."""
        self.idle, prompts = 0.0, [*join.rests, *map(self._begin, join.prompts)]
        self.aside = [prompt for prompt in self.aside if prompt not in join.rests]
        rows = self.with_others([prompt.row for prompt in prompts], join.shape.rows)
        self.reading = Reading(prompts=prompts, shape=join.shape, rows=rows)
        return self.reading

    def next_shape(self, reading: Reading) -> PassShape:
        """Of the next chunk of what is read: a prompt's last may be a short one."""
        usual, least = reading.shape, reading.least_shape
        shorter = least != usual and self.costs.prefers(Work(least, reading.policy), [Work(usual, reading.policy)])
        return least if shorter else usual

    def steps(self) -> int:
        """Decode steps of all running rows that the pool surely serves in one dispatch; 0: it must have room first."""
        running, reading = self.running, self.reading
        step = sum(self.costs.of(self._narrowest(rows, policy)[1]) for policy, rows in self.dispatches())
        chunk = 0.0 if reading is None else self.costs.of(Work(reading.shape, reading.policy))
        soonest = min(self.sequence(row).tokens_left for row in running) if self.queue else None
        steps = self.schedule.steps(step or None, chunk, soonest)
        while steps and not self._growth(running, steps) + self._unread() <= self.counts.free:
            steps //= 2
        return steps

    def steps_ahead(self, rows: Sequence[int], sent: int) -> int:
        """Steps of another dispatch for rows to which so many were sent, before it is known what they made; 0: that may
        change what is done next.

        It can't where all go on for longer, nobody waits whom an earlier end would let in, nothing on this side ends or
        chooses anything, and the pool serves both.
        """
        if self.reading is not None or self.aside or list(rows) != self.running:
            return 0
        answers = [self.sequence(row) for row in rows]
        if self.queue and (any(answer.ends for answer in answers) or (None in self.rows and not self.short_of_memory)):
            return 0
        if any(a.replaying or a.ends_here or a.tokens_left <= sent for a in answers):
            return 0
        steps = self.steps()
        while steps and not self._growth(rows, sent + steps) <= self.counts.free:
            steps //= 2
        return steps

    def dispatches(self) -> Iterable[tuple[Policy | None, list[int]]]:
        """Running rows by what their policies do in decoding; each group is decoded together."""
        alike: dict[Policy | None, list[int]] = {}
        for row in self.running:
            policy = self.sequence(row).request.policy
            alike.setdefault(policy if policy is not None and policy.acts_in_decoding else None, []).append(row)
        return alike.items()

    def work(self, rows: Sequence[int], policy: Policy | None, steps: int) -> Work:
        """What decodes these rows for so many steps: as few as can be, or more where that is compiled."""
        least, compiled = self._narrowest(rows, policy)
        return least if least != compiled and self.costs.prefers(least, [compiled], times=steps) else compiled

    def _narrowest(self, rows: Sequence[int], policy: Policy | None) -> tuple[Work, Work]:
        """A decode step of as few rows as can be, and the cheapest that is compiled, if any is."""
        least = Work(min(width(len(rows)), len(self.rows)), policy)
        wider = [work for work in self.costs.seen if work.policy == policy and work.is_step and work.size >= len(rows)]
        return least, min(wider, key=self.costs.of, default=least)

    def whom_to_compress_again(self) -> list[int]:
        """Running rows that may have outgrown their budgets."""
        policies = {row: self.sequence(row).request.policy for row in self.running}
        return [row for row, policy in policies.items() if policy is not None and policy.compress_every is not None]

    def whom_to_put_back(self) -> int:
        """The youngest's row, also where its prompt is still being read. So the oldest always goes on."""
        taken = [(sequence.order, row) for row, sequence in enumerate(self.rows) if sequence is not None]
        return max(taken)[1]

    def put_back(self, row: int) -> list[int]:
        """A row's sequence waits again, before all others; gives the rows that are free for it."""
        self.queue.appendleft(self.sequence(row))
        freed = self.leave(row)
        self.preemptions += 1
        self.locked = bool(self.running)
        return freed

    def leave(self, row: int) -> list[int]:
        """A row is free, and so are those that were to go on from what it reads; gives them all."""
        freed = [row]
        self.aside = [prompt for prompt in self.aside if prompt.row != row]
        if self.reading is not None:
            first = self.reading.prompts[0]
            forks, sibling = first.forks, first.forks.pop(row, None)
            if sibling is not None:
                first.sequence.siblings.remove(sibling)
            if first.row == row:
                self.reading, freed = None, [row, *forks]
        sequence = self.sequence(row)
        if sequence.finish_reason == "stop":
            self.stopped += 1
            self.stopped_tokens += len(sequence.token_ids)
        self.prefixes.give_up(row)
        for each in freed:
            self.rows[each] = None
        self.locked = False
        return freed

    def _begin(self, joining: Joining) -> PromptInProgress:
        sequence, share = joining.sequence, joining.share
        self.queue.remove(sequence)
        self.rows[joining.row] = sequence
        self.joined += 1
        sequence.begin(order=self.joined)
        self.prefixes.borrow(joining.row, share)
        forks = dict(zip(joining.forks, sequence.siblings, strict=True))
        for row, sibling in forks.items():
            self.rows[row] = sibling
            self.joined += 1
            sibling.begin(order=self.joined)
        before = Blocks(raw=self.config.full_blocks(share.borrow_tokens))
        if self.context_row is not None:
            before += self.counts.held(self.context_row)
        return PromptInProgress(
            row=joining.row,
            sequence=sequence,
            part=joining.plan.part,
            read=share.borrow_tokens,
            lend_tokens=share.lend_tokens,
            most=joining.takes + before,
            leaves=joining.leaves + before,
            forks=forks,
        )

    def _joining(self, sequence: Answer, plan: PromptPlan, row: int) -> Joining:
        share = self._share(sequence, plan)
        takes = self._takes(sequence, plan, share)
        leaves = left_blocks(self.config, sequence.request, takes, self.expected(sequence))
        others = [other for other, taken in enumerate(self.rows) if taken is None and other != row]
        forks = tuple(others[: len(sequence.siblings)])
        return Joining(sequence=sequence, row=row, plan=plan, share=share, takes=takes, leaves=leaves, forks=forks)

    def _split(self, joining: Joining, free: Blocks) -> Joining | None:
        """The same, but in parts that fit; None: they don't, or it may not be."""
        request, policy = joining.sequence.request, joining.sequence.request.policy
        if policy is None or not (policy.scorer.settled if self.split_prompts is None else self.split_prompts):
            return None
        plan = plan_parts(request, policy, self.config, free.raw)
        if plan is None or plan.part < min(CHUNK, joining.plan.part):  # smaller parts fill no pass
            return None
        return self._joining(joining.sequence, plan, joining.row)

    def _together(self, first: Joining, grows: Blocks, free: Blocks, cuts: bool) -> Join:
        """Who is read with the first in the queue, in one pass; nothing but its own prefix is borrowed where others are
        cut."""
        rows = [row for row, taken in enumerate(self.rows) if taken is None]
        policy, prompts, shape = first.sequence.request.policy, [first], None
        rests = self._rests_of(policy) if self._is_short(first) else []
        if rests:
            shape = shape_together([each.unread for each in (first, *rests)], len(self.rows))
        for sequence in self._packable(first):
            if len(prompts) == len(rows):
                break
            assert isinstance(sequence.plan, PromptPlan)
            more = [*prompts, self._joining(sequence, sequence.plan, rows[len(prompts)])]
            lengths = [each.unread for each in (*rests, *more)]
            wider, share = shape_together(lengths, len(self.rows)), more[-1].share
            borrows = share.prefix is None or not cuts or share.prefix is first.share.prefix
            if wider is not None and not share.lend_tokens and borrows and self._fit(more, grows, free):
                prompts, shape = more, wider
        each = [each.unread for each in (*rests, *prompts)]
        if shape is None or not self._pays_together(shape, each, policy):
            return Join(prompts=(first,), shape=shape_alone(min(first.plan.part, first.unread)))
        return Join(prompts=tuple(prompts), rests=tuple(rests), shape=shape)

    def _pays_together(self, shape: PassShape, lengths: Iterable[int], policy: Policy | None) -> bool:
        each = [Work(shape_alone(length), policy) for length in lengths]
        return len(each) > 1 and self.costs.prefers(Work(shape, policy), each)

    def _rests(self) -> Join:
        """Those whose rests wait for others are read to their ends: together, or the first of them."""
        rests = self._rests_of(self.aside[0].sequence.request.policy)
        lengths = [prompt.unread for prompt in rests]
        shape = shape_together(lengths, len(self.rows))
        if shape is not None and self._pays_together(shape, lengths, rests[0].sequence.request.policy):
            return Join(prompts=(), rests=tuple(rests), shape=shape)
        return Join(prompts=(), rests=tuple(rests[:1]), shape=shape_alone(lengths[0]))

    def _rests_of(self, policy: Policy | None) -> list[PromptInProgress]:
        return [prompt for prompt in self.aside if prompt.sequence.request.policy == policy]

    def _is_short(self, joining: Joining) -> bool:
        """Whether all that is to be read of a prompt goes into a pass with others."""
        whole = joining.plan.part >= len(joining.sequence.request.prompt)
        alone = joining.share.lend_tokens or joining.forks
        return whole and not alone and joining.unread <= LONGEST_TOGETHER

    def _packable(self, first: Joining) -> Iterator[Answer]:
        """Some who wait not far behind the first, as would go into one pass with it were there rows and room."""
        request = first.sequence.request
        if not self._is_short(first):
            return
        lengths = [each.unread for each in (*self._rests_of(request.policy), first)]
        for sequence in islice(self.queue, 1, 2 * MOST_TOGETHER):
            plan, other = sequence.plan, sequence.request
            if isinstance(plan, Unservable) or sequence.siblings:
                continue
            if other.policy != request.policy or plan.part < len(other.prompt):
                continue
            unread = len(other.prompt) - (self.prefixes.borrowable(other) if first.share.prefix is not None else 0)
            if shape_together([*lengths, unread], len(self.rows)) is not None:
                lengths.append(unread)
                yield sequence

    def _saved_by_waiting(self, prompts: tuple[Joining, ...]) -> float:
        """Seconds, if these are read with as many others as wait and fit into a pass, rather than now."""
        policy = prompts[0].sequence.request.policy
        if not any(work.packs and work.policy == policy for work in self.costs.seen):
            return 0.0
        most, read = 1 + sum(1 for _ in self._packable(prompts[0])), len(prompts)
        for_want_of_rows = read == self.rows.count(None) < most
        return self.costs.overhead * (1 - read / most) if for_want_of_rows else 0.0

    def _share(self, sequence: Answer, plan: PromptPlan) -> Share:
        """What is read in parts shares nothing; what is compressed lends where the pool holds the copy, too."""
        request = sequence.request
        if not self.share_prefixes or plan.part < len(request.prompt):
            return Share()
        share = self.prefixes.share_for(request, (other.request for other in self.queue if other is not sequence))
        copied = self.config.full_blocks(share.lend_tokens) if request.policy is not None else 0
        return share if plan.peak_blocks + copied <= self.counts.total.raw else Share()

    def _takes(self, sequence: Answer, plan: PromptPlan, share: Share) -> Blocks:
        request = sequence.request
        if request.policy is None:
            return Blocks(raw=plan.peak_blocks - self.config.full_blocks(share.borrow_tokens))
        copied = self.config.full_blocks(share.lend_tokens)
        quantised = compressed_blocks(self.config, request.policy, len(request.prompt)).quantised
        quantised += forked_blocks(self.config, request).quantised
        return Blocks(raw=plan.peak_blocks + copied, quantised=quantised)
