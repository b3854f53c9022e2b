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
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache import CacheConfig, PagedCache
from jaxkv.cache.stats import CacheStats, stats_of
from jaxkv.engine.costs import Costs, Work
from jaxkv.engine.decisions import Join, Wait
from jaxkv.engine.dispatch import Dispatch
from jaxkv.engine.prefixes import SharedPrefix, on_host
from jaxkv.engine.programs import Programs
from jaxkv.engine.reading import PromptInProgress, Reading
from jaxkv.engine.sampling import replaying_sampler_for, sampler_for
from jaxkv.engine.schedule import STEPS, Schedule
from jaxkv.engine.scheduler import Scheduler
from jaxkv.engine.sequence import Sequence
from jaxkv.generation.prompt import observation_of
from jaxkv.policies import Policy
from jaxkv.requests import Event, PromptRead, Refused
from models import TokenizerError


class Engine:
    """Answers requests with one model and one cache.

    Args:
      programs: the model's.
      config: the cache's sizes; its batch is the number of rows.
      cache: an empty one; given away.
      share_prefixes: whether prompts that start alike are looked for, and read once.
      schedule: what goes first; None: whatever lets most be decoded together.
      costs: what the model's passes and steps took so far; noted here.
      split_prompts: see ``Scheduler``.
    """

    def __init__(
        self,
        programs: Programs,
        config: CacheConfig,
        cache: PagedCache,
        *,
        share_prefixes: bool = True,
        schedule: Schedule | None = None,
        costs: Costs | None = None,
        split_prompts: bool | None = None,
    ):
        self.programs, self.config, self.cache = programs, config, cache
        self.scheduler = Scheduler(
            config, share_prefixes=share_prefixes, schedule=schedule, costs=costs, split_prompts=split_prompts
        )
        self.rows, self.prefixes, self.counts = self.scheduler.rows, self.scheduler.prefixes, self.scheduler.counts
        self._looks, self._received, self._agreed = 0, 0.0, programs.devices.agreed
        """How often the counts were read back by themselves, and when steps were last received."""
        self._one_row = jax.eval_shape(lambda cache: cache.rows(jnp.zeros(1, jnp.int32)), cache)
        """The shapes of a cache of one row."""
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

    def run(self, sequences: Iterable[Sequence | Refused]) -> Iterator[Event]:
        """Events of all requests; few more are drawn from the iterable than there are free rows."""
        source, scheduler, ended = iter(sequences), self.scheduler, False
        while True:
            while not ended and scheduler.wants_requests:
                drawn = next(source, None)
                ended = drawn is None
                if isinstance(drawn, Sequence):
                    scheduler.queue.append(drawn)
                elif drawn is not None:
                    yield drawn
            yield from self._admit()
            if scheduler.reading is not None:
                yield from self._read_chunk(scheduler.reading)
                if not scheduler.schedule.alternates:
                    continue
            if scheduler.running:
                yield from self._decode()
            elif scheduler.reading is None and not scheduler.queue and ended:
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
                reading, share = self.scheduler.join(join), join.prompts[0].share
                if share.prefix is not None:
                    blocks = share.borrow_tokens // self.config.block_size
                    self.cache = self.programs.attach(self.cache, reading.prompts[0].row, share.prefix.prefix, blocks)
                    self._look()
                self.borrowed_tokens += share.borrow_tokens
                self._begin_part(reading)
                for prompt in reading.prompts:
                    yield PromptRead(request=prompt.sequence.index, tokens=prompt.read, total=prompt.total)

    def _begin_part(self, reading: Reading) -> None:
        fresh = all(prompt.read < prompt.part for prompt in reading.prompts)
        lengths = reading.part_lengths
        reading.state = self.programs.start(self.cache, reading.rows, lengths, reading.policy, fresh=fresh)

    def _read_chunk(self, reading: Reading) -> Iterator[Event]:
        """The next chunk; after a part's last, compression; after the prompts', first the first tokens."""
        policy, first = reading.policy, reading.prompts[0]
        with self._timed("prefill", reading.sequences) as seconds:
            shape = self.scheduler.next_shape(reading)
            tokens, counts = reading.next_chunk(shape)
            self.cache, reading.state = self.programs.chunk(
                self.cache, reading.state, reading.rows, tokens, counts, policy, shape.length
            )
            jax.block_until_ready(reading.state.hidden)
        self.scheduler.costs.note(Work(shape, policy), *self._agreed(seconds["prefill"], seconds["compile"]))
        self.passes += 1
        for prompt, count in reading.of_prompts(counts):
            prompt.read += count
            self.prompt_tokens += count
        if first.read == first.lend_tokens:
            self.cache, prefix = self.programs.detach(self.cache, first.row)
            self.prefixes.lend(first.row, first.ids[: first.read], on_host(prefix))
        for prompt in reading.prompts:
            yield PromptRead(request=prompt.sequence.index, tokens=prompt.read, total=prompt.total)
        if not first.part_is_read:
            self._look()
            return
        if observation_of(policy).rereads:
            self._reread(reading)
        if first.read == first.total:
            yield from self._finish_prompts(reading)
        else:
            yield from self._finish_part(reading, first)

    def _reread(self, reading: Reading) -> None:
        """Reads the part that ends here once more, for a policy that scores by what that attends to."""
        policy, length = reading.policy, reading.shape.length
        assert policy is not None
        with self._timed("prefill", reading.sequences):
            for tokens, counts in reading.part_again():
                reading.state = self.programs.reread(
                    self.cache, reading.state, reading.rows, tokens, counts, policy, length
                )
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
        policy, rows = reading.policy, [prompt.row for prompt in reading.prompts]
        params = [sequence.request.params for sequence in reading.sequences]
        sampler = sampler_for([*params, *params[:1] * (reading.shape.rows - len(params))])
        with self._timed("prefill", reading.sequences):
            if policy is not None and self.prefixes.give_up(rows[0]):
                self.cache = self.programs.own(self.cache, rows[0])
            self.cache, *made = self.programs.finish(self.cache, reading.state, reading.rows, sampler, policy)
            tokens, logprobs = self._look(*made)
        self.scheduler.reading = None
        if policy is not None:
            self._compress(rows, among=reading.rows)
        for at, (row, sequence) in enumerate(zip(rows, reading.sequences, strict=True)):
            sequence.cache = self._stats(row)
            if error := self.scheduler.too_large(row):
                self._leave([row])
                yield Refused(request=sequence.index, error=error)
            else:
                yield from self._accept({row: at}, tokens[:, None], logprobs[:, None], np.ones_like(tokens))

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
        with self._timed("compress", map(self.scheduler.sequence, rows)):
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
        whole = work.size == len(self.rows)  # all in their own order: nothing is gathered
        place = rows if whole else list(range(len(rows)))
        pending, limits = np.zeros(work.size, np.int32), np.zeros(work.size, np.int32)
        each, made = sequences[:1] * work.size, 0 if after is None else after.steps
        for at, sequence in zip(place, sequences, strict=True):
            pending[at], limits[at], each[at] = sequence.pending, min(steps, sequence.tokens_left - made), sequence
        sent = self.programs.decode(
            self.cache,
            pending if after is None else after.made.last,
            limits,
            replaying_sampler_for(each),
            STEPS,
            policy,
            None if whole else self.scheduler.with_others(rows, work.size),
            np.array([bool(sequence.ends) for sequence in each]),
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
        tokens, logprobs, counts, held = jax.device_get(
            (sent.made.tokens, sent.made.logprobs, sent.made.counts, sent.made.held)
        )
        if sent.looks == self._looks:
            self.counts.take(held)
        else:  # since then somebody left
            self._look()
        seconds = {"compile": sent.compiling}
        seconds["decode"] = time.perf_counter() - max(sent.began, self._received) - sent.compiling
        self._received = time.perf_counter()
        for sequence in sent.sequences:
            sequence.timings.add(seconds)
        run = int(counts.max())
        took, compiling = self._agreed(seconds["decode"], sent.compiling)
        if not sent.follows:  # else what the host did meanwhile is in it
            self.scheduler.costs.note(sent.work, took / max(run, 1), compiling)
        self.scheduler.note_decoding(took)
        self.decode_seconds += seconds["decode"]
        self.decode_steps += run
        self.decoded += int(counts.sum())
        each = zip(sent.rows, sent.place, sent.sequences, strict=True)
        still = {row: at for row, at, sequence in each if self.rows[row] is sequence}
        if not counts[list(still.values())].all():
            raise RuntimeError("the pool ran dry while decoding, though blocks were kept free; please report this")
        yield from self._accept(still, tokens, logprobs, counts)

    def _accept(
        self, places: dict[int, int], tokens: np.ndarray, logprobs: np.ndarray, counts: np.ndarray
    ) -> Iterator[Event]:
        """Takes what rows have made, each at its place the first ``counts`` tokens; those that end leave together."""
        ended: list[int] = []
        finite = np.isfinite(logprobs.sum(axis=-1)).tolist()
        made, said = tokens.tolist(), logprobs.tolist()
        for row, at in places.items():
            sequence, count, error = self.scheduler.sequence(row), int(counts[at]), None
            try:
                if not finite[at]:
                    error = "the model's logits are not finite: its weights are damaged, or too large for their dtype"
                else:
                    yield from list(sequence.take(made[at][:count], said[at][:count]))
            except TokenizerError as what:
                error = str(what)
            if error is not None:
                yield Refused(request=sequence.index, error=error)
            elif sequence.finish_reason is not None:
                yield sequence.finished(self._stats(row))
            if error is not None or sequence.finish_reason is not None:
                ended.append(row)
        self._leave(ended)

    def _make_room(self) -> Iterator[Event]:
        """Drops unused prefixes; else compresses what has outgrown its budget; else puts the youngest back.

        Who has all rows to itself and still finds no room would find none again: where heads are split over devices,
        one of these may be full while others aren't, which isn't known before.
        """
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
            held, total = self.counts.held(row).fullest, self.counts.total
            error = (
                f"the answer can't go on: a device holds {held.raw} of its {total.raw} blocks for it alone, and "
                f"{held.quantised} of its {total.quantised} quantised ones; give more cache_memory, or ask for less"
            )
            yield Refused(request=self.scheduler.sequence(row).index, error=error)
            self._leave([row])
            return
        self.scheduler.put_back(row)
        self._release([row])

    def _leave(self, rows: list[int]) -> None:
        for row in rows:
            self.scheduler.leave(row)
        self._release(rows)

    def _release(self, rows: list[int]) -> None:
        if rows:
            self.cache = self.programs.release(self.cache, np.isin(np.arange(len(self.rows)), rows))
            self._look()

    def _cut(self, prefixes: Iterable[SharedPrefix]) -> None:
        """Gives back what of these nobody borrows."""
        for shared in prefixes:
            self.cache, left = self.programs.cut(self.cache, shared.prefix, shared.in_use)
            self.prefixes.cut(shared, on_host(left))
            self._look()

    def _stats(self, row: int) -> CacheStats:
        return stats_of(self._one_row, self.counts.seen.row(row))

    def _look(self, *also: jax.Array) -> list[np.ndarray]:
        """Reads back what the heads hold and what is free, and other arrays, in one transfer."""
        self._looks += 1
        return self.counts.look(self.programs.counts(self.cache), *also)

    @contextmanager
    def _timed(self, phase: str, sequences: Iterable[Sequence]) -> Iterator[dict[str, float]]:
        """Adds what happens inside to the sequences' timings, and tells at the end; compiling is a phase of its own."""
        seconds: dict[str, float] = {}
        began, compiled = time.perf_counter(), self.programs.compile_seconds
        yield seconds
        seconds["compile"] = self.programs.compile_seconds - compiled
        seconds[phase] = time.perf_counter() - began - seconds["compile"]
        for sequence in sequences:
            sequence.timings.add(seconds)
