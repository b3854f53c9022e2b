"""Continuous batching under a hard memory bound: requests join and leave between dispatches of many decode steps.

A fixed number of rows share one pool. A request joins when its whole prompt fits beside what the running ones may soon
need; one prompt is read at a time, a chunk between two dispatches, so nobody stalls. A prompt that is larger than the
pool is read in parts, each compressed before the next (``engine.prompt_plan``); a prefix with which several begin is
read once and kept as long as there is room (``engine.prefixes``). Where the pool would run dry, sequences that have
outgrown their budget are compressed again, if their policy does that at all; then the youngest is
put back to the head of the queue. It is read again later and its tokens are replayed through the same steps, so its
answer and its cache are what they would have been alone. The oldest always goes on, so every trace comes to an end.

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
from jaxkv.cache.stats import CacheStats, stats
from jaxkv.engine.prefixes import SharedPrefix
from jaxkv.engine.programs import Programs
from jaxkv.engine.reading import PromptInProgress
from jaxkv.engine.sampling import replaying_sampler_for, sampler_for
from jaxkv.engine.scheduler import STEPS, Join, Scheduler, Wait
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
    """

    def __init__(self, programs: Programs, config: CacheConfig, cache: PagedCache, *, share_prefixes: bool = True):
        self.programs, self.config, self.cache = programs, config, cache
        self.scheduler = Scheduler(config, share_prefixes=share_prefixes)
        self.rows, self.prefixes, self.counts = self.scheduler.rows, self.scheduler.prefixes, self.scheduler.counts
        self.prompt_tokens = self.borrowed_tokens = 0
        """Tokens of prompts read, and those borrowed instead."""
        self.decode_steps = self.decoded = 0
        """Steps run, and tokens that they made, replayed ones included."""
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
            if scheduler.running:
                yield from self._decode()
            elif scheduler.reading is None and not scheduler.queue and ended:
                self._cut(self.prefixes.unused())
                return

    def _admit(self) -> Iterator[Event]:
        """Begins to read the first in the queue, where there is a row and room for its prompt."""
        match self.scheduler.next():
            case Refused() as refused:
                self.scheduler.queue.popleft()
                yield refused
            case Wait(cut=cut):
                self._cut(cut)
            case Join() as join:
                self._cut(join.cut)
                prompt, share = self.scheduler.join(join), join.share
                if share.prefix is not None:
                    blocks = share.borrow_tokens // self.config.block_size
                    self.cache = self.programs.attach(self.cache, prompt.row, share.prefix.prefix, blocks)
                    self._look()
                self.borrowed_tokens += share.borrow_tokens
                self._begin_part(prompt)
                yield PromptRead(request=prompt.sequence.index, tokens=prompt.read, total=prompt.total)

    def _begin_part(self, prompt: PromptInProgress) -> None:
        policy, fresh = prompt.sequence.request.policy, prompt.read < prompt.part
        prompt.state = self.programs.start(self.cache, prompt.row, prompt.part_length, policy, fresh=fresh)

    def _read_chunk(self, prompt: PromptInProgress) -> Iterator[Event]:
        """The next chunk of the prompt; after a part's last, compression; after the prompt's, first the first token."""
        row, sequence, policy = prompt.row, prompt.sequence, prompt.sequence.request.policy
        with self._timed("prefill", [sequence]):
            tokens, count = prompt.next_chunk()
            self.cache, prompt.state = self.programs.chunk(self.cache, prompt.state, row, tokens, count, policy)
            jax.block_until_ready(prompt.state.hidden)
        prompt.read += count
        self.prompt_tokens += count
        if prompt.read == prompt.lend_tokens:
            self.cache, prefix = self.programs.detach(self.cache, row)
            self.prefixes.lend(row, prompt.ids[: prompt.read], jax.device_get(prefix))
        yield PromptRead(request=sequence.index, tokens=prompt.read, total=prompt.total)
        if not prompt.part_is_read:
            self._look()
            return
        if observation_of(policy).rereads:
            self._reread(prompt)
        if prompt.read == prompt.total:
            yield from self._finish_prompt(prompt)
        else:
            yield from self._finish_part(prompt)

    def _reread(self, prompt: PromptInProgress) -> None:
        """Reads the part that ends here once more, for a policy that scores by what that attends to."""
        policy = prompt.sequence.request.policy
        assert policy is not None
        with self._timed("prefill", [prompt.sequence]):
            for tokens, count in prompt.part_again():
                prompt.state = self.programs.reread(self.cache, prompt.state, prompt.row, tokens, count, policy)
            jax.block_until_ready(prompt.state)

    def _finish_part(self, prompt: PromptInProgress) -> Iterator[Event]:
        """Compresses what is read to what the whole prompt's budget leaves, and begins the next part."""
        policy = prompt.sequence.request.policy
        assert policy is not None
        self.cache = self.programs.score(self.cache, prompt.state, prompt.row, policy)
        self._compress(prompt.row, tokens=prompt.total)
        if error := self.scheduler.parts_too_large(prompt):
            self._leave(prompt.row)
            yield Refused(request=prompt.sequence.index, error=error)
            return
        self._begin_part(prompt)

    def _finish_prompt(self, prompt: PromptInProgress) -> Iterator[Event]:
        row, sequence = prompt.row, prompt.sequence
        policy, sampler = sequence.request.policy, sampler_for([sequence.request.params])
        with self._timed("prefill", [sequence]):
            if policy is not None and self.prefixes.give_up(row):
                self.cache = self.programs.own(self.cache, row)
            self.cache, token, logprob = self.programs.finish(self.cache, prompt.state, row, sampler, policy)
            first, logprob = int(token[0]), float(logprob[0])
        self.scheduler.reading = None
        if policy is not None:
            self._compress(row)
        self._look()
        sequence.cache = self._stats(row)
        if error := self.scheduler.too_large(row):
            self._leave(row)
            yield Refused(request=sequence.index, error=error)
            return
        yield from self._accept(row, [first], [logprob])

    def _compress(self, row: int, tokens: int = 0) -> None:
        """To the budget of the tokens that it has seen, or of so many where those are more."""
        sequence = self.scheduler.sequence(row)
        policy = sequence.request.policy
        assert policy is not None
        with self._timed("compress", [sequence]):
            self.cache = jax.block_until_ready(self.programs.compress_row(self.cache, row, tokens, policy))
        self._look()

    def _decode(self) -> Iterator[Event]:
        """As many steps for all running rows as the pool surely serves; makes room first where that is none."""
        steps = self.scheduler.steps()
        if steps == 0:
            self._make_room()
            return
        for policy, rows in self.scheduler.dispatches():
            yield from self._decode_rows(rows, steps, policy)

    def _decode_rows(self, rows: list[int], steps: int, policy: Policy | None) -> Iterator[Event]:
        """One dispatch, for rows whose policies do the same in decoding."""
        decoding = {row: self.scheduler.sequence(row) for row in rows}
        pending, limits = np.zeros(len(self.rows), np.int32), np.zeros(len(self.rows), np.int32)
        for row, sequence in decoding.items():
            pending[row], limits[row] = sequence.pending, min(steps, sequence.tokens_left)
        anyone = decoding[rows[0]]
        with self._timed("decode", decoding.values()) as seconds:
            sampler = replaying_sampler_for([decoding.get(row, anyone) for row in range(len(self.rows))])
            made = self.programs.decode(self.cache, pending, limits, sampler, STEPS, policy)
            self.cache = made.cache
            tokens, logprobs, counts = jax.device_get((made.tokens, made.logprobs, made.counts))
            self._look()
        self.decode_seconds += seconds["decode"]
        self.decode_steps += int(counts.max())
        self.decoded += int(counts.sum())
        for row in rows:
            count = counts[row]
            if count == 0:
                raise RuntimeError("the pool ran dry while decoding, though blocks were kept free; please report this")
            yield from self._accept(row, tokens[row, :count].tolist(), logprobs[row, :count].tolist())

    def _accept(self, row: int, tokens: list[int], logprobs: list[float]) -> Iterator[Event]:
        sequence = self.scheduler.sequence(row)
        if not np.all(np.isfinite(logprobs)):
            self._leave(row)
            error = "the model's logits are not finite: its weights are damaged, or too large for their dtype"
            yield Refused(request=sequence.index, error=error)
            return
        try:
            made = list(sequence.take(tokens, logprobs))
        except TokenizerError as error:
            self._leave(row)
            yield Refused(request=sequence.index, error=str(error))
            return
        yield from made
        if sequence.finish_reason is not None:
            at_end = self._stats(row)
            self._leave(row)
            yield sequence.finished(at_end)

    def _make_room(self) -> None:
        """Drops unused prefixes; else compresses what has outgrown its budget; else puts the youngest back."""
        before = self.counts.free
        self._cut(self.prefixes.unused())
        if not self.counts.free <= before:
            return
        for row in self.scheduler.whom_to_compress_again():
            self._compress(row)
        if not self.counts.free <= before:
            return
        row = self.scheduler.whom_to_put_back()
        self.scheduler.put_back(row)
        self._release(row)

    def _leave(self, row: int) -> None:
        self.scheduler.leave(row)
        self._release(row)

    def _release(self, row: int) -> None:
        self.cache = self.programs.release(self.cache, np.arange(len(self.rows)) == row)
        self._look()

    def _cut(self, prefixes: Iterable[SharedPrefix]) -> None:
        """Gives back what of these nobody borrows."""
        for shared in prefixes:
            self.cache, left = self.programs.cut(self.cache, shared.prefix, shared.in_use)
            self.prefixes.cut(shared, jax.device_get(left))
            self._look()

    def _stats(self, row: int) -> CacheStats:
        return stats(self.cache.rows(jnp.array([row])))

    def _look(self) -> None:
        """Reads back what the heads hold and what is free."""
        self.counts.look(self.cache)

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
