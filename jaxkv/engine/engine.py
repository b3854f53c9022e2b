"""Continuous batching under a hard memory bound: requests join and leave between dispatches of many decode steps.

A fixed number of rows share one pool. A request joins when its whole prompt fits beside what the running ones may soon
need; short prompts are read together, a long one a chunk at a time; whether the others go on between its chunks is the
schedule's choice (``engine.schedule``). A prompt that is larger than the pool is read in parts, each compressed before
the next (``engine.prompt_plan``); a prefix with which several begin is read once and kept as long as there is room
(``engine.prefixes``). Where the pool would run dry, sequences that have outgrown their budget are compressed again, if
their policy does that at all; then the youngest is put back to the head of the queue. It is read again later and its
tokens are replayed through the same steps, so its answer and its cache are what they would have been alone. The oldest
always goes on, so every trace comes to an end.

``engine.scheduler`` decides all that; here it is carried out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import count

import jax
import numpy as np

from jaxkv.cache import PagedCache, snapshot
from jaxkv.engine.costs import Work
from jaxkv.engine.decisions import Join, Wait
from jaxkv.engine.dispatch import Dispatch, Made
from jaxkv.engine.prefixes import SharedPrefix, on_host
from jaxkv.engine.programs import Programs
from jaxkv.engine.reading import PromptInProgress, Reading
from jaxkv.engine.refusals import alone_too_large
from jaxkv.engine.sampling import Samplers, most_likeliest
from jaxkv.engine.schedule import STEPS
from jaxkv.engine.scheduler import Scheduler
from jaxkv.engine.sequence import Sequence
from jaxkv.engine.timing import timed
from jaxkv.generation.prompt import observation_of
from jaxkv.policies import Policy
from jaxkv.requests import Event, Refused
from models import TokenizerError

END = object()


class Engine:
    """Answers requests with one model and one cache.

    Args:
      programs: the model's.
      scheduler: of a cache of these sizes.
      cache: an empty one, or with a context that the scheduler knows of; given away.
      samplers: what makes samplers for rows; None: as they ask.
    """

    def __init__(
        self, programs: Programs, scheduler: Scheduler, cache: PagedCache, *, samplers: Samplers | None = None
    ):
        self.samplers = samplers or Samplers(vocab_size=programs.model.sizes.vocab_size)
        self.programs, self.scheduler, self.config, self.cache = programs, scheduler, scheduler.config, cache
        self.rows, self.prefixes, self.counts = scheduler.rows, scheduler.prefixes, scheduler.counts
        self._looks, self._received, self._agreed = 0, 0.0, programs.devices.agreed
        """How often the counts were read back by themselves, and when steps were last received."""
        self.prompt_tokens = self.borrowed_tokens = 0
        """Tokens of prompts read, and those borrowed instead."""
        self.passes = self.decode_steps = self.decoded = 0
        """Passes over prompts, decode steps, and tokens that the steps made, replayed ones included."""
        self.decode_seconds = 0.0
        """Without compiling."""

    @property
    def preemptions(self) -> int:
        """How often a sequence was put back."""
        return self.scheduler.preemptions

    def run(self, sequences: Iterable[Sequence | Refused | None]) -> Iterator[Event]:
        """Events of all requests; few more are drawn from the iterable than there are free rows.

        Args:
          sequences: None among them says that there is none for now.
        """
        source, scheduler, ended = iter(sequences), self.scheduler, False
        if scheduler.context_row is not None:
            self._look()
        while True:
            while not ended and scheduler.wants_requests:
                drawn = next(source, END)
                ended = drawn is END
                if isinstance(drawn, Sequence):
                    scheduler.queue.append(drawn)
                elif isinstance(drawn, Refused):
                    yield drawn
                else:
                    break
            yield from self._admit()
            if scheduler.reading is not None:
                yield from self._read_chunk(scheduler.reading)
                if not scheduler.schedule.alternates:
                    continue
            if scheduler.running:
                yield from self._decode()
            elif ended and scheduler.is_empty:
                self._cut(self.prefixes.unused())
                return

    def _admit(self) -> Iterator[Event]:
        """Begins to read the first in the queue, where there is a row and room for its prompt, or several with it."""
        match self.scheduler.next():
            case Refused() as refused:
                self.scheduler.queue.popleft()
                yield refused
            case Wait(cut=cut):
                self._cut(cut)
            case Join() as join:
                self._cut(join.cut)
                reading = self.scheduler.join(join)
                for row, share in ((joining.row, joining.share) for joining in join.prompts):
                    if share.prefix is not None:
                        blocks = share.borrow_tokens // self.config.block_size
                        self.cache = self.programs.attach(self.cache, row, share.prefix.prefix, blocks)
                        self._look()
                    self.borrowed_tokens += share.borrow_tokens
                if self.scheduler.context_row is not None and join.prompts:
                    self._fork(self.scheduler.context_row, [joining.row for joining in join.prompts])
                self._begin_part(reading)
                yield from reading.progress()

    def _begin_part(self, reading: Reading) -> None:
        fresh = self.scheduler.context_row is None and all(prompt.read < prompt.part for prompt in reading.prompts)
        lengths = reading.part_lengths
        reading.state = self.programs.start(self.cache, reading.rows, lengths, reading.policy, fresh=fresh)
        for place, prompt in enumerate(reading.prompts):
            if prompt.state is not None:
                reading.state, prompt.state = self.programs.take_up(reading.state, prompt.state, place), None

    def _read_chunk(self, reading: Reading) -> Iterator[Event]:
        """The next chunk; after a part's last, compression; after the prompts', first the first tokens."""
        policy, first = reading.policy, reading.prompts[0]
        with timed(self.programs, "prefill", reading.sequences) as seconds:
            shape = self.scheduler.next_shape(reading)
            tokens, counts = reading.next_chunk(shape)
            self.cache, reading.state = self.programs.chunk(
                self.cache, reading.state, reading.rows, tokens, counts, policy, shape.length
            )
            jax.block_until_ready(reading.state.hidden)
        self.scheduler.costs.note(Work(shape, policy), *self._agreed(seconds["prefill"], seconds["compile"]))
        self.passes += 1
        for prompt, tokens in reading.of_prompts(counts):
            prompt.read += tokens
            self.prompt_tokens += tokens
        if first.read == first.lend_tokens:
            self.cache, prefix = self.programs.detach(self.cache, first.row)
            self.prefixes.lend(first.row, first.ids[: first.read], on_host(prefix))
        yield from reading.progress()
        if not first.part_is_read:
            self._look()
            if (waits := self.scheduler.set_aside()) is not None:
                waits.state = reading.state
            return
        if observation_of(policy).rereads:
            self._reread(reading)
        if first.read == first.total:
            yield from self._finish_prompts(reading)
        else:
            yield from self._finish_part(reading, first)

    def _reread(self, reading: Reading) -> None:
        """Reads the part that ends here once more, for a policy that scores by what that attends to."""
        policy, length, programs = reading.policy, reading.shape.length, self.programs
        assert policy is not None
        with timed(self.programs, "prefill", reading.sequences):
            for place, tokens, counts in reading.part_again():
                if place is None or length is None:
                    rows, state = reading.rows, reading.state
                    reading.state = programs.reread(self.cache, state, rows, tokens, counts, policy, length)
                else:  # too long for a pass with the others
                    one, row = programs.one_prompt(reading.state, place), reading.rows[place]
                    one = programs.reread(self.cache, one, int(row), tokens, counts, policy, None)
                    reading.state = programs.take_up(reading.state, one, place)
            jax.block_until_ready(reading.state)

    def _finish_part(self, reading: Reading, prompt: PromptInProgress) -> Iterator[Event]:
        """Compresses what is read to what the whole prompt's budget leaves, and begins the next part."""
        policy = reading.policy
        assert policy is not None
        self.cache = self.programs.score(self.cache, reading.state, reading.rows, policy)
        self._compress([prompt.row], tokens=prompt.total)
        if error := self.scheduler.parts_too_large(prompt):
            self._leave([prompt.row])
            yield Refused(request=prompt.sequence.index, error=error)
            return
        self._begin_part(reading)

    def _finish_prompts(self, reading: Reading) -> Iterator[Event]:
        """The first tokens, from the full caches, and compression; who can't be answered leaves."""
        policy, rows, first = reading.policy, [prompt.row for prompt in reading.prompts], reading.prompts[0]
        each = [*reading.sequences, *reading.sequences[:1] * (reading.shape.rows - len(rows)), *first.forks.values()]
        sampler, top = self.samplers.first(each), most_likeliest(each)
        with timed(self.programs, "prefill", reading.sequences):
            for row in rows if policy is not None else ():
                if self.prefixes.give_up(row):
                    self.cache = self.programs.own(self.cache, row)
            self.cache, made = self.programs.finish(
                self.cache, reading.state, reading.rows, sampler, policy, top, len(first.forks)
            )
            made = Made.of_first(self._look(*made))
        if policy is not None:
            self._compress(rows, among=reading.rows)
        if error := self.scheduler.too_large(first.row) if first.forks else None:
            self._leave([first.row])  # before they are forked, and all with it
            yield Refused(request=first.sequence.index, error=error)
            return
        self.scheduler.reading = None
        if first.forks:
            self._fork(first.row, [*first.forks], policy)
            first.sequence.siblings = []  # put back, each is read for itself
        for row, at in [*zip(rows, count()), *zip(first.forks, count(reading.shape.rows))]:
            sequence = self.scheduler.sequence(row)
            sequence.cache = self.counts.stats(row)
            if error := self.scheduler.too_large(row):
                self._leave([row])
                yield Refused(request=sequence.index, error=error)
                continue
            if sequence.request.keeps:
                sequence.kept = snapshot.take(self.cache, row)
            yield from self._accept({row: at}, made)

    def _fork(self, row: int, into: list[int], policy: Policy | None = None) -> None:
        """Others go on from what a row holds; what a policy changes while it decodes is each one's own at once."""
        self.cache, granted = self.programs.fork(self.cache, row, np.array(into, np.int32))
        if policy is not None and policy.acts_in_decoding:
            for each in into:
                self.cache = self.programs.own(self.cache, each)
        if not self._look(granted)[0]:
            raise RuntimeError("no block was free for a fork, though they were kept for it; please report this")

    def _compress(self, rows: list[int], tokens: int = 0, among: np.ndarray | None = None) -> None:
        """To the budgets of the tokens that they have seen, or of so many where those are more.

        Args:
          rows: of one policy.
          tokens: of each.
          among: ``i32[n]`` these rows and others, for which there is a program; None: just these.
        """
        policy = self.scheduler.sequence(rows[0]).request.policy
        assert policy is not None
        among = np.array(rows, np.int32) if among is None else among
        with timed(self.programs, "compress", map(self.scheduler.sequence, rows)):
            select, tokens_of_each = np.arange(len(among)) < len(rows), np.full(len(among), tokens, np.int32)
            self.cache = self.programs.compress_rows(self.cache, among, tokens_of_each, policy, select)
            self._look()

    def _decode(self) -> Iterator[Event]:
        """As many steps for all running rows as the pool surely serves; makes room first where that is none."""
        steps = self.scheduler.steps()
        if steps == 0:
            yield from self._make_room()
            return
        for policy, rows in self.scheduler.dispatches():
            sent = self._send(rows, steps, policy)
            while sent is not None:
                ahead = self.scheduler.steps_ahead(sent.rows, sent.steps)
                following = self._send(sent.rows, ahead, policy, after=sent) if ahead else None
                yield from self._receive(sent)
                sent = following

    def _send(self, rows: list[int], steps: int, policy: Policy | None, *, after: Dispatch | None = None) -> Dispatch:
        """Sends decode steps to the device, for rows whose policies do the same in decoding.

        Args:
          rows: who is decoded.
          steps: tokens of each at most.
          policy: what it does in decoding.
          after: steps for the same rows which were sent before and not yet received; these go on from there.
        """
        began, compiled = time.perf_counter(), self.programs.compile_seconds
        sequences = [self.scheduler.sequence(row) for row in rows]
        work = self.scheduler.work(rows, policy, steps) if after is None else after.work
        whole = work.size == self.config.batch  # all in their own order: nothing is gathered
        place = rows if whole else list(range(len(rows)))
        pending, limits = np.zeros(work.size, np.int32), np.zeros(work.size, np.int32)
        each, made = sequences[:1] * work.size, 0 if after is None else after.steps
        for at, sequence in zip(place, sequences, strict=True):
            pending[at], limits[at], each[at] = sequence.pending, min(steps, sequence.tokens_left - made), sequence
        sent = self.programs.decode(
            self.cache,
            pending if after is None else after.made.last,
            limits,
            self.samplers.next(each),
            STEPS,
            policy,
            None if whole else self.scheduler.with_others(rows, work.size),
            np.array([sequence.stops_at_own for sequence in each]),
            most_likeliest(each),
        )
        self.cache = sent.cache
        return Dispatch(
            rows=rows,
            sequences=sequences,
            place=place,
            steps=steps,
            work=work,
            made=sent,
            looks=self._looks,
            began=began,
            compiling=self.programs.compile_seconds - compiled,
            follows=after is not None,
        )

    def _receive(self, sent: Dispatch) -> Iterator[Event]:
        """Takes what steps have made, perhaps while others run."""
        made, held = jax.device_get((Made.of_steps(sent.made), sent.made.held))
        if sent.looks == self._looks:
            self.counts.take(held)
        else:  # since then somebody left
            self._look()
        seconds = {"compile": sent.compiling}
        seconds["decode"] = time.perf_counter() - max(sent.began, self._received) - sent.compiling
        self._received = time.perf_counter()
        for sequence in sent.sequences:
            sequence.timings.add(seconds)
        run = int(made.counts.max())
        took, compiling = self._agreed(seconds["decode"], sent.compiling)
        if not sent.follows:  # else what the host did meanwhile is in it
            self.scheduler.costs.note(sent.work, took / max(run, 1), compiling)
        self.scheduler.note_decoding(took)
        self.decode_seconds += seconds["decode"]
        self.decode_steps += run
        self.decoded += int(made.counts.sum())
        each = zip(sent.rows, sent.place, sent.sequences, strict=True)
        still = {row: at for row, at, sequence in each if self.rows[row] is sequence}
        if not made.counts[list(still.values())].all():
            raise RuntimeError("the pool ran dry while decoding, though blocks were kept free; please report this")
        yield from self._accept(still, made)

    def _accept(self, places: dict[int, int], made: Made) -> Iterator[Event]:
        """Takes what rows have made, each at its place; those that end leave together."""
        ended: list[int] = []
        finite, rows = np.isfinite(made.logprobs.sum(axis=-1)).tolist(), made.rows()
        for row, at in places.items():
            sequence, error = self.scheduler.sequence(row), None
            try:
                if not finite[at]:
                    error = "the model's logits are not finite: its weights are damaged, or too large for their dtype"
                elif text := sequence.take(*rows[at], made.top(at, sequence.request.params.top_logprobs)):
                    yield text
            except TokenizerError as what:
                error = str(what)
            if error is not None:
                yield Refused(request=sequence.index, error=error)
            elif sequence.finish_reason is not None:
                yield from sequence.finished(self.counts.stats(row))
            if error is not None or sequence.finish_reason is not None:
                ended.append(row)
        self._leave(ended)

    def _make_room(self) -> Iterator[Event]:
        """Drops unused prefixes; else compresses what has outgrown its budget; else puts the youngest back. One alone
        would find no more room later: of devices that share heads, one may be full while others aren't."""
        before = self.counts.free
        self._cut(self.prefixes.unused())
        if not self.counts.free <= before:
            return
        for row in self.scheduler.whom_to_compress_again():
            self._compress([row])
        if not self.counts.free <= before:
            return
        row = self.scheduler.whom_to_put_back()
        if self.rows.count(None) == len(self.rows) - 1:
            yield Refused(request=self.scheduler.sequence(row).index, error=alone_too_large(self.counts, row))
            self._leave([row])
            return
        self._release(self.scheduler.put_back(row))

    def _leave(self, rows: list[int]) -> None:
        self._release([freed for row in rows for freed in self.scheduler.leave(row)])

    def _release(self, rows: list[int]) -> None:
        if rows:
            self.cache = self.programs.release(self.cache, np.isin(np.arange(self.config.batch), rows))
            self._look()

    def _cut(self, prefixes: Iterable[SharedPrefix]) -> None:
        """Gives back what of these nobody borrows."""
        for shared in prefixes:
            self.cache, left = self.programs.cut(self.cache, shared.prefix, shared.in_use)
            self.prefixes.cut(shared, on_host(left))
            self._look()

    def _look(self, *also: jax.Array) -> list[np.ndarray]:
        """Reads back what the heads hold and what is free, and other arrays, in one transfer."""
        self._looks += 1
        return self.counts.look(self.programs.counts(self.cache), *also)
