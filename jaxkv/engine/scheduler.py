"""Who joins, what is decoded, who makes room: decided from counts on the host; the engine carries it out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from jaxkv.cache.config import CacheConfig
from jaxkv.engine.block_counts import BlockCounts, Blocks
from jaxkv.engine.costs import Costs, PassShape, Work
from jaxkv.engine.decisions import Join, Joining, Wait
from jaxkv.engine.prefixes import AHEAD, Prefixes, Share, SharedPrefix
from jaxkv.engine.prompt_plan import PromptPlan, Unservable, compressed_blocks, more_memory, plan_parts
from jaxkv.engine.reading import PromptInProgress, Reading, shape_alone, shape_together
from jaxkv.engine.schedule import STEPS, Schedule, Throughput
from jaxkv.engine.sequence import Sequence as Answer
from jaxkv.generation.prefill import CHUNK
from jaxkv.policies import Policy
from jaxkv.requests import Refused

HORIZON = 4 * STEPS
"""Tokens that an answer is expected to go on for at least, where it isn't sooner at its limit."""


class Scheduler:
    """The rows of a cache, and what waits for one. Decisions change nothing, but they note why somebody waits, and
    what programs that aren't compiled would have saved; ``join``, ``leave`` and the like do.

    Args:
      config: the cache's sizes; its batch is the number of rows.
      share_prefixes: whether prompts that start alike are looked for, and read once.
      schedule: what goes first.
      costs: what was seen of earlier runs with the same model.
      split_prompts: whether a prompt that will be compressed is read in parts where as a whole it could join only
        later; None: where its policy's scores don't depend on what follows.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        share_prefixes: bool = True,
        schedule: Schedule | None = None,
        costs: Costs | None = None,
        split_prompts: bool | None = None,
    ):
        self.config, self.share_prefixes, self.split_prompts = config, share_prefixes, split_prompts
        self.schedule, self.costs = schedule or Throughput(), costs or Costs()
        self.counts = BlockCounts(config)
        self.prefixes = Prefixes(config.block_size)
        self.rows: list[Answer | None] = [None] * config.batch
        self.queue: deque[Answer] = deque()
        self.reading: Reading | None = None
        self.joined = self.preemptions = 0
        self.idle = 0.0
        """Seconds of decoding, since somebody joined, that rows stood idle which those who wait could have had; of all
        rows together one second a second."""
        self.stopped = self.stopped_tokens = 0
        """Answers that ended before their limits, and their tokens."""
        self.short_of_memory = False
        """Whether, when this was last asked, the first in the queue had a row but no room."""
        self.locked = False
        """After a preemption nobody joins until somebody leaves: else the two would take turns for ever."""

    def sequence(self, row: int) -> Answer:
        """That of a row that is taken."""
        sequence = self.rows[row]
        assert sequence is not None
        return sequence

    @property
    def running(self) -> list[int]:
        """Rows that decode: all taken but those whose prompts are being read."""
        reading = [] if self.reading is None else [prompt.row for prompt in self.reading.prompts]
        return [row for row, sequence in enumerate(self.rows) if sequence is not None and row not in reading]

    @property
    def wants_requests(self) -> bool:
        """Whether there are fewer in the queue than could get a row, and one more, or those that may share a prefix."""
        return len(self.queue) < self.rows.count(None) + (AHEAD if self.share_prefixes else 1)

    def next(self) -> Join | Wait | Refused:
        """What to do about the first in the queue; it joins where its whole prompt fits beside what others soon need.

        Others that wait join with it, where their prompts go into the same pass of the model and that costs less.
        """
        if not self.queue or self.reading is not None or self.locked:
            return Wait()
        sequence, running = self.queue[0], self.running
        plan = sequence.plan
        if isinstance(plan, Unservable):
            return Refused(request=sequence.index, error=plan.reason)
        if None not in self.rows:
            return Wait()
        first, cut = self._joining(sequence, plan, self.rows.index(None)), ()
        grows = self._growth_by(running, [self.expected(self.sequence(row)) for row in running])
        self.short_of_memory = not self._fit([first], grows, self.counts.free)
        if self.short_of_memory and (split := self._split(first, self.counts.free - grows)) is not None:
            first, self.short_of_memory = split, not self._fit([split], grows, self.counts.free)
        if self.short_of_memory:
            cut = self.prefixes.unused(but=first.share.prefix)
            self.short_of_memory = not self._fit([first], grows, self.counts.free + self._freed_by(cut))
            if self.short_of_memory:
                # Where nobody runs, nothing but prefixes is in its way, also the one that it would have shared.
                return Wait(cut=cut if running else self.prefixes.unused())
        prompts, shape = self._together(first, grows, self.counts.free + self._freed_by(cut))
        if running and not self.schedule.joins(self.idle, self._saved_by_waiting(prompts)):
            return Wait()
        return Join(prompts=prompts, shape=shape, cut=cut)

    def join(self, join: Join) -> Reading:
        """Those who join get their rows."""
        self.idle, rows = 0.0, [joining.row for joining in join.prompts]
        self.reading = Reading(
            prompts=[self._begin(joining) for joining in join.prompts],
            shape=join.shape,
            rows=self.with_others(rows, join.shape.rows),
        )
        return self.reading

    def next_shape(self, reading: Reading) -> PassShape:
        """Of the next chunk of what is read: a prompt's last may be a short one."""
        usual, least = reading.shape, reading.least_shape
        shorter = least != usual and self.costs.prefers(Work(least, reading.policy), [Work(usual, reading.policy)])
        return least if shorter else usual

    def with_others(self, rows: Sequence[int], width: int) -> np.ndarray:
        """``i32[width]``: these rows, and then as many others as it takes, each once."""
        taken = set(rows)
        others = (row for row in range(len(self.rows)) if row not in taken)
        return np.array([*rows, *islice(others, width - len(rows))], np.int32)

    def too_large(self, row: int) -> str | None:
        """Why an answer can't be given to a prompt that is read and compressed; None where it can."""
        counts, total, request = self.counts, self.counts.total, self.sequence(row).request
        if self.config.tiers is not None and counts.left_unquantised(row, request.policy):
            whole = self.config.heads * self.config.tiers.full_blocks(len(request.prompt) + request.limit)
            return (
                f"the prompt doesn't fit its {total.quantised} quantised blocks; "
                f"{more_memory(self.config, whole, quantised=True)}, a smaller budget, or shorten it"
            )
        held, policy, tokens = counts.held(row), request.policy, request.until_compressed
        more = self._growth([row], tokens)
        if policy is not None and tokens < request.limit:
            whole = len(request.prompt) + request.limit
            held = held.or_more(compressed_blocks(self.config, policy, whole))
            if not policy.placement.quantises_decoding:
                more = more.or_more(Blocks(raw=self.config.full_blocks(tokens)))
        if held + more <= total:
            return None
        quantised, held, more = bool(np.all(held.raw + more.raw <= total.raw)), held.fullest, more.fullest
        have, grows = (held.quantised, more.quantised) if quantised else (held.raw, more.raw)
        when = "once it is read" if tokens == request.limit else "whenever it is compressed"
        return (
            f"the prompt holds {have} blocks {when}, but {tokens} more tokens may need {grows}; "
            f"{more_memory(self.config, have + grows, quantised=quantised)}, or ask for fewer tokens"
        )

    def parts_too_large(self, prompt: PromptInProgress) -> str | None:
        """Why the next part can't be read beside what is left of those before; None where it can."""
        held = self.counts.held(prompt.row).fullest.raw
        need = held + self.config.full_blocks(prompt.part_length)
        if need <= prompt.most.raw:
            return None
        return (
            f"the prompt holds {held} blocks once {prompt.read} of its {prompt.total} tokens are read and compressed, "
            f"so {need} with the next part, and may hold {prompt.most.raw}; protect less, or give more memory"
        )

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
        if self.reading is not None or list(rows) != self.running:
            return 0
        answers = [self.sequence(row) for row in rows]
        if self.queue and (any(answer.ends for answer in answers) or (None in self.rows and not self.short_of_memory)):
            return 0
        if any(a.replaying or a.request.params.stop or a.tokens_left <= sent for a in answers):
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
        least = Work(min(_width(len(rows)), len(self.rows)), policy)
        wider = [work for work in self.costs.seen if work.policy == policy and work.is_step and work.size >= len(rows)]
        return least, min(wider, key=self.costs.of, default=least)

    def note_decoding(self, seconds: float) -> None:
        """Rows have been decoded for so long, while others stood idle."""
        self.idle += seconds * min(self.rows.count(None), len(self.queue)) / len(self.rows)

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
        if self.reading is not None and self.reading.prompts[0].row == row:
            self.reading = None
        sequence = self.sequence(row)
        if sequence.finish_reason == "stop":
            self.stopped += 1
            self.stopped_tokens += len(sequence.token_ids)
        self.prefixes.give_up(row)
        self.rows[row] = None
        self.locked = False

    def _begin(self, joining: Joining) -> PromptInProgress:
        sequence, share = joining.sequence, joining.share
        self.queue.remove(sequence)
        self.rows[joining.row] = sequence
        self.joined += 1
        sequence.begin(order=self.joined)
        self.prefixes.borrow(joining.row, share)
        return PromptInProgress(
            row=joining.row,
            sequence=sequence,
            part=joining.plan.part,
            read=share.borrow_tokens,
            lend_tokens=share.lend_tokens,
            most=joining.takes + Blocks(raw=self.config.full_blocks(share.borrow_tokens)),
        )

    def _joining(self, sequence: Answer, plan: PromptPlan, row: int) -> Joining:
        share = self._share(sequence, plan)
        takes = self._takes(sequence, plan, share)
        leaves = self._leaves(sequence, takes)
        return Joining(sequence=sequence, row=row, plan=plan, share=share, takes=takes, leaves=leaves)

    def _split(self, joining: Joining, free: Blocks) -> Joining | None:
        """The same, but in parts that fit; None: they don't, or it may not be."""
        request, policy = joining.sequence.request, joining.sequence.request.policy
        if policy is None or not (policy.scorer.settled if self.split_prompts is None else self.split_prompts):
            return None
        plan = plan_parts(request, policy, self.config, free.raw)
        if plan is None or plan.part < min(CHUNK, joining.plan.part):  # smaller parts fill no pass
            return None
        return self._joining(joining.sequence, plan, joining.row)

    def _leaves(self, sequence: Answer, takes: Blocks) -> Blocks:
        """What a request will hold at its end, of what its prompt takes."""
        policy, more = sequence.request.policy, self.expected(sequence)
        if policy is None:
            return takes + Blocks(raw=self.config.full_blocks(more))
        kept = compressed_blocks(self.config, policy, len(sequence.request.prompt))
        if policy.placement.quantises_decoding:
            assert self.config.tiers is not None
            return kept + Blocks(quantised=self.config.heads * self.config.tiers.full_blocks(more))
        return kept + Blocks(raw=self.config.full_blocks(more))

    def _fit(self, prompts: Sequence[Joining], grows: Blocks, free: Blocks) -> bool:
        """Whether so many blocks suffice for these prompts, all read before any is compressed, and then for the answers
        to their ends, beside those who are answering and grow by so much. Alone, a prompt must only be read."""
        takes = sum((joining.takes for joining in prompts), Blocks())
        if len(prompts) == 1 and not self.running:
            return takes <= free
        leave = sum((joining.leaves for joining in prompts), Blocks())
        need = takes.or_more(leave) + grows if self.schedule.alternates else takes.or_more(leave + grows)
        return need <= free

    def _together(self, first: Joining, grows: Blocks, free: Blocks) -> tuple[tuple[Joining, ...], PassShape]:
        """Who is read with the first in the queue, in one pass, and its shape."""
        rows = [row for row, taken in enumerate(self.rows) if taken is None]
        policy, prompts, shape = first.sequence.request.policy, [first], None
        for sequence in self._packable(first):
            if len(prompts) == len(rows):
                break
            assert isinstance(sequence.plan, PromptPlan)
            more = [*prompts, self._joining(sequence, sequence.plan, rows[len(prompts)])]
            wider = shape_together([joining.plan.part for joining in more], len(self.rows))
            if wider is not None and more[-1].share == Share() and self._fit(more, grows, free):
                prompts, shape = more, wider
        alone = shape_alone(min(first.plan.part, len(first.sequence.request.prompt) - first.share.borrow_tokens))
        each = [Work(shape_alone(joining.plan.part), policy) for joining in prompts]
        if shape is None or not self.costs.prefers(Work(shape, policy), each):
            return (first,), alone
        return tuple(prompts), shape

    def _packable(self, first: Joining) -> Iterator[Answer]:
        """Those who wait behind the first, as many as would go into one pass with it were there rows and room."""
        request, lengths = first.sequence.request, [first.plan.part]
        if first.share != Share() or first.plan.part < len(request.prompt):
            return
        for sequence in islice(self.queue, 1, None):
            plan, other = sequence.plan, sequence.request
            if isinstance(plan, Unservable) or other.policy != request.policy or plan.part < len(other.prompt):
                continue
            if shape_together([*lengths, plan.part], len(self.rows)) is not None:
                lengths.append(plan.part)
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
        return Blocks(raw=plan.peak_blocks + copied, quantised=quantised)

    def _growth(self, rows: Sequence[int], tokens: int) -> Blocks:
        """What these rows allocate for at most so many more tokens each."""
        return self._growth_by(rows, [min(tokens, self.sequence(row).tokens_left) for row in rows])

    def _growth_by(self, rows: Sequence[int], tokens: Sequence[int]) -> Blocks:
        return self.counts.growth(rows, [self.sequence(row).request.policy for row in rows], tokens)

    def _unread(self) -> Blocks:
        """What the rest of the prompts being read, and their compression, may still take."""
        left = Blocks()
        for prompt in [] if self.reading is None else self.reading.prompts:
            left += prompt.most - self.counts.held(prompt.row)
        return left

    def _freed_by(self, cut: Iterable[SharedPrefix]) -> Blocks:
        return Blocks(raw=self.config.heads * sum(shared.blocks - shared.in_use for shared in cut))


def _width(rows: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, …: few widths, of which no row in three is idle."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power
