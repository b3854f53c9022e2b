"""Continuous batching under a hard memory bound: requests join and leave between dispatches of many decode steps.

A fixed number of rows share one pool. A request joins when its whole prompt fits beside what the running ones may soon
need; one prompt is read at a time, a chunk between two dispatches, so nobody stalls. A prompt that is larger than the
pool is read in parts, each compressed before the next (``jaxkv.admission``). Where the pool would run dry,
sequences that have outgrown their budget are compressed again, if their policy does that at all; then the youngest is
put back to the head of the queue. It is read again later and its tokens are replayed through the same steps, so its
answer and its cache are what they would have been alone. The oldest always goes on, so every trace comes to an end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.admission import Reading, more_memory, plan_reading, refusal
from jaxkv.answers import Answer
from jaxkv.cache import CacheConfig, PagedCache, stats, take_sequences
from jaxkv.policies import Policy
from jaxkv.prompt import CHUNK, PromptState
from jaxkv.requests import Event, PromptRead, Refused, sampler_for
from jaxkv.sampling import Forced, Sampler
from jaxkv.steps import CompiledSteps

STEPS = 16
"""Decode steps in one dispatch: what a stream waits for."""
HORIZON = 4 * STEPS
"""Tokens that each running sequence must still have room for when another joins; else it would soon be put back."""


@dataclass(kw_only=True)
class Prompt:
    """One that is being read."""

    row: int
    reading: Reading
    state: PromptState
    """Of its present part."""
    read: int
    """Tokens."""


class Engine:
    """Answers requests with one model and one cache.

    Args:
      steps: the model's programs.
      config: the cache's sizes; its batch is the number of rows.
      cache: an empty one; given away.
    """

    def __init__(self, steps: CompiledSteps, config: CacheConfig, cache: PagedCache):
        self.steps, self.config, self.cache = steps, config, cache
        self.rows: list[Answer | None] = [None] * config.batch
        self.queue: deque[Answer] = deque()
        self.prompt: Prompt | None = None
        """The one that is being read."""
        self.joined = 0
        self.preemptions = 0
        self.decode_steps = self.decoded = 0
        """Steps run, and tokens that they made, replayed ones included."""
        self.decode_seconds = 0.0
        """Without compiling."""
        self.locked = False
        """After a preemption nobody joins until somebody leaves: else the two would take turns for ever."""
        self.lengths = np.zeros(cache.lengths.shape, np.int32)
        self.free = config.num_blocks - 1

    def run(self, answers: Iterable[Answer | Refused]) -> Iterator[Event]:
        """Events of all requests; as many are drawn from the iterable as there are free rows."""
        source, ended = iter(answers), False
        while True:
            while not ended and len(self.queue) < self.rows.count(None):
                drawn = next(source, None)
                ended = drawn is None
                if isinstance(drawn, Answer):
                    self.queue.append(drawn)
                elif drawn is not None:
                    yield drawn
            if self.queue and self.prompt is None and not self.locked:
                yield from self._admit()
            if self.prompt is not None:
                yield from self._read_chunk()
            if self._running():
                yield from self._decode()
            elif self.prompt is None and not self.queue and ended:
                return

    def _answer(self, row: int) -> Answer:
        """That of a row that is taken."""
        answer = self.rows[row]
        assert answer is not None
        return answer

    def _running(self) -> list[int]:
        """Rows that decode: all taken but the one whose prompt is being read."""
        reading = self.prompt.row if self.prompt is not None else None
        return [row for row, answer in enumerate(self.rows) if answer is not None and row != reading]

    def _growth(self, rows: list[int], tokens: int) -> int:
        """Blocks that these rows allocate for at most so many more tokens each."""
        size, total = self.config.block_size, 0
        for row in rows:
            answer = self._answer(row)
            lengths = self.lengths[:, row]
            more = min(tokens, answer.tokens_left)
            total += int((-(-(lengths + more) // size) + (-lengths // size)).sum())
        return total

    def _held(self, row: int) -> int:
        """Blocks."""
        return int((-(-self.lengths[:, row] // self.config.block_size)).sum())

    def _unread(self) -> int:
        """Blocks that the rest of the prompt being read may still take."""
        return self.prompt.reading.peak - self._held(self.prompt.row) if self.prompt is not None else 0

    def _admit(self) -> Iterator[Event]:
        """Begins to read the first in the queue, where there is a row and room for its prompt."""
        answer, running = self.queue[0], self._running()
        request = answer.request
        if error := refusal(request, self.config):
            self.queue.popleft()
            yield Refused(request=answer.index, error=error)
            return
        reading = plan_reading(request, self.config)
        assert reading is not None
        need = reading.peak
        if request.policy is None and running:
            need += self.config.full_blocks(min(HORIZON, request.limit))
        if None not in self.rows or need > self.free - self._growth(running, HORIZON):
            return
        self.queue.popleft()
        row = self.rows.index(None)
        self.rows[row] = answer
        self.joined += 1
        answer.begin(order=self.joined)
        self._begin_part(row, reading, 0)
        yield PromptRead(request=answer.index, tokens=0, total=len(request.prompt))

    def _begin_part(self, row: int, reading: Reading, read: int) -> None:
        request = self._answer(row).request
        state = self.steps.start(self.cache, row, min(reading.part, len(request.prompt) - read), request.policy)
        self.cache, self.prompt = state.cache, Prompt(row=row, reading=reading, state=state, read=read)

    def _read_chunk(self) -> Iterator[Event]:
        """The next chunk of the prompt; after a part's last, compression; after the prompt's, first the first token."""
        assert self.prompt is not None
        prompt, row, part = self.prompt, self.prompt.row, self.prompt.reading.part
        answer = self._answer(row)
        ids, total = answer.request.prompt, len(answer.request.prompt)
        end = min((prompt.read // part + 1) * part, total)
        began, compiled = time.perf_counter(), self.steps.compile_seconds
        size = min(CHUNK, -(-part // 64) * 64)
        count = min(size, end - prompt.read)
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :count] = ids[prompt.read : prompt.read + count]
        state = replace(prompt.state, cache=self.cache)
        prompt.state = state = self.steps.chunk(state, row, jnp.asarray(tokens), count, answer.request.policy)
        prompt.read += count
        self.cache = state.cache
        jax.block_until_ready(state.hidden)
        answer.timings.spent("prefill", began, self.steps.compile_seconds - compiled)
        yield PromptRead(request=answer.index, tokens=prompt.read, total=total)
        if prompt.read == total:
            yield from self._finish_prompt(row, answer, state)
        elif prompt.read == end:
            yield from self._finish_part(prompt, answer)
        else:
            self._look()

    def _finish_part(self, prompt: Prompt, answer: Answer) -> Iterator[Event]:
        """Compresses what is read to what the whole prompt's budget leaves, and begins the next part."""
        policy, total = answer.request.policy, len(answer.request.prompt)
        assert policy is not None
        self.cache = self.steps.score(prompt.state, prompt.row, policy)
        self._compress(prompt.row, tokens=total)
        held, peak = self._held(prompt.row), prompt.reading.peak
        need = held + self.config.full_blocks(min(prompt.reading.part, total - prompt.read))
        if need > peak:
            error = (
                f"the prompt holds {held} blocks once {prompt.read} of its {total} tokens are read and compressed, "
                f"so {need} with the next, and the pool is shared out for {peak}; protect less, or give more memory"
            )
            self._leave(prompt.row)
            yield Refused(request=answer.index, error=error)
            return
        self._begin_part(prompt.row, prompt.reading, prompt.read)

    def _finish_prompt(self, row: int, answer: Answer, state: PromptState) -> Iterator[Event]:
        policy, sampler = answer.request.policy, sampler_for([answer.request.params])
        began, compiled = time.perf_counter(), self.steps.compile_seconds
        self.cache, token, logprob = self.steps.finish(state, row, sampler, policy)
        first, logprob = int(token[0]), float(logprob[0])
        self.prompt = None
        answer.timings.spent("prefill", began, self.steps.compile_seconds - compiled)
        if policy is not None:
            self._compress(row)
        self._look()
        answer.cache = stats(take_sequences(self.cache, jnp.array([row])))
        more = self._growth([row], answer.request.limit)
        held = answer.cache.blocks_held
        if held + more > self.config.num_blocks - 1:
            error = (
                f"the prompt holds {held} blocks once it is read, but {answer.request.limit} more tokens "
                f"may need {more}; {more_memory(self.config, held + more)}, or ask for fewer tokens"
            )
            self._leave(row)
            yield Refused(request=answer.index, error=error)
            return
        yield from self._accept(row, [first], [logprob])

    def _compress(self, row: int, tokens: int = 0) -> None:
        """To the budget of the tokens that it has seen, or of so many where those are more."""
        answer = self._answer(row)
        assert answer.request.policy is not None
        began, compiled = time.perf_counter(), self.steps.compile_seconds
        self.cache = jax.block_until_ready(self.steps.compress(self.cache, row, tokens, answer.request.policy))
        answer.timings.spent("compress", began, self.steps.compile_seconds - compiled)
        self._look()

    def _decode(self) -> Iterator[Event]:
        """As many steps for all running rows as the pool surely serves; makes room first where that is none."""
        running = self._running()
        steps = STEPS
        while steps and self._growth(running, steps) > self.free - self._unread():
            steps //= 2
        if steps == 0:
            self._make_room(running)
            return
        alike: dict[Policy | None, list[int]] = {}
        for row in running:
            alike.setdefault(_deciding(self._answer(row).request.policy), []).append(row)
        for policy, rows in alike.items():
            yield from self._decode_rows(rows, steps, policy)

    def _decode_rows(self, rows: list[int], steps: int, policy: Policy | None) -> Iterator[Event]:
        """One dispatch, for rows whose policies do the same in decoding."""
        pending, limits = np.zeros(len(self.rows), np.int32), np.zeros(len(self.rows), np.int32)
        for row in rows:
            answer = self._answer(row)
            pending[row], limits[row] = answer.pending, min(steps, answer.tokens_left)
        began, compiled = time.perf_counter(), self.steps.compile_seconds
        sampler = self._sampler(rows)
        made = self.steps.decode(self.cache, jnp.asarray(pending), jnp.asarray(limits), sampler, STEPS, policy)
        self.cache = made.cache
        tokens, logprobs, counts = jax.device_get((made.tokens, made.logprobs, made.counts))
        self._look()
        compiling = self.steps.compile_seconds - compiled
        self.decode_seconds += time.perf_counter() - began - compiling
        self.decode_steps += int(counts.max())
        self.decoded += int(counts.sum())
        for row in rows:
            answer, count = self._answer(row), counts[row]
            if count == 0:
                raise RuntimeError("the pool ran dry while decoding, though blocks were kept free; please report this")
            answer.timings.spent("decode", began, compiling)
            yield from self._accept(row, tokens[row, :count].tolist(), logprobs[row, :count].tolist())

    def _sampler(self, rows: list[int]) -> Sampler:
        """Each row's own; those that repeat what they said before they were put back are told what it was."""
        someone = self._answer(rows[0])
        answers = [self._answer(row) if row in rows else someone for row in range(len(self.rows))]
        sampler = sampler_for([answer.request.params for answer in answers])
        longest = max(answer.replaying for answer in answers)
        if longest == 0:
            return sampler
        width = max(64, 1 << (longest - 1).bit_length())  # few different widths: each is a program of its own
        tokens, first = np.full((len(answers), width), -1, np.int32), np.zeros(len(answers), np.int32)
        for row, answer in enumerate(answers):
            told = answer.token_ids[answer.replayed :][:width]
            tokens[row, : len(told)] = told
            first[row] = len(answer.request.prompt) + answer.replayed
        return Forced(sampler=sampler, tokens=jnp.asarray(tokens), first=jnp.asarray(first))

    def _accept(self, row: int, tokens: list[int], logprobs: list[float]) -> Iterator[Event]:
        answer = self._answer(row)
        yield from answer.take(tokens, logprobs)
        if answer.finish_reason is not None:
            at_end = stats(take_sequences(self.cache, jnp.array([row])))
            self._leave(row)
            self.locked = False
            yield answer.finished(at_end)

    def _make_room(self, running: list[int]) -> None:
        """Compresses what has outgrown its budget; where that frees nothing, puts the youngest back."""
        before = self.free
        for row in running:
            policy = self._answer(row).request.policy
            if policy is not None and policy.compress_every is not None:
                self._compress(row)
        if self.free > before:
            return
        taken = (row for row, answer in enumerate(self.rows) if answer is not None)
        row = max(taken, key=lambda row: self._answer(row).order)
        answer = self._answer(row)
        self._leave(row)
        self.queue.appendleft(answer)
        self.preemptions += 1
        self.locked = bool(self._running())

    def _leave(self, row: int) -> None:
        if self.prompt is not None and self.prompt.row == row:
            self.prompt = None
        self.rows[row] = None
        self.cache = self.steps.release(self.cache, jnp.arange(len(self.rows)) == row)
        self._look()

    def _look(self) -> None:
        """Reads back what the heads hold and what is free."""
        lengths, free = jax.device_get((self.cache.lengths, self.cache.num_free))
        self.lengths, self.free = lengths, int(free)


def _deciding(policy: Policy | None) -> Policy | None:
    """What a policy is for decoding: None where it neither observes it nor compresses again."""
    return policy if policy is not None and (policy.observes_decoding or policy.compress_every is not None) else None
