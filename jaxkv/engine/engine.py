"""Continuous batching under a hard memory bound: requests join and leave between dispatches of many decode steps.

A fixed number of rows share one pool. A request joins when its whole prompt fits beside what the running ones may soon
need; one prompt is read at a time, a chunk between two dispatches, so nobody stalls. A prompt that is larger than the
pool is read in parts, each compressed before the next (``engine.scheduler``); a prefix with which several begin is
read once and kept as long as there is room (``engine.prefixes``). Where the pool would run dry, sequences that have
outgrown their budget are compressed again, if their policy does that at all; then the youngest is
put back to the head of the queue. It is read again later and its tokens are replayed through the same steps, so its
answer and its cache are what they would have been alone. The oldest always goes on, so every trace comes to an end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache import CacheConfig, PagedCache
from jaxkv.cache.stats import stats
from jaxkv.engine.block_counts import QUANTISED, RAW, Room
from jaxkv.engine.prefixes import AHEAD, Kept, choose
from jaxkv.engine.programs import CompiledSteps
from jaxkv.engine.reading import Prompt, chunk_of
from jaxkv.engine.scheduler import more_memory, plan_reading, refusal
from jaxkv.engine.sequence import Answer
from jaxkv.generation.prefill import CHUNK, PromptState
from jaxkv.generation.sampling import Forced, Sampler
from jaxkv.policies import Policy
from jaxkv.requests import Event, PromptRead, Refused, sampler_for

STEPS = 16
"""Decode steps in one dispatch: what a stream waits for."""
STEPS_WHILE_READING = 4
"""The same between two chunks of a prompt: the sooner it is read, the more are decoded together."""
HORIZON = 4 * STEPS
"""Tokens that each running sequence must still have room for when another joins; else it would soon be put back."""


class Engine:
    """Answers requests with one model and one cache.

    Args:
      steps: the model's programs.
      config: the cache's sizes; its batch is the number of rows.
      cache: an empty one; given away.
      share_prefixes: whether prompts that start alike are looked for, and read once.
    """

    def __init__(self, steps: CompiledSteps, config: CacheConfig, cache: PagedCache, *, share_prefixes: bool = True):
        self.steps, self.config, self.cache = steps, config, cache
        self.rows: list[Answer | None] = [None] * config.batch
        self.queue: deque[Answer] = deque()
        self.prompt: Prompt | None = None
        """The one that is being read."""
        self.share_prefixes = share_prefixes
        self.prefixes: list[Kept] = []
        self.prompt_tokens = self.borrowed_tokens = 0
        """Tokens of prompts read, and those borrowed instead."""
        self.joined = 0
        self.preemptions = 0
        self.decode_steps = self.decoded = 0
        """Steps run, and tokens that they made, replayed ones included."""
        self.decode_seconds = 0.0
        """Without compiling."""
        self.locked = False
        """After a preemption nobody joins until somebody leaves: else the two would take turns for ever."""
        self.room = Room(config, cache)

    def run(self, answers: Iterable[Answer | Refused]) -> Iterator[Event]:
        """Events of all requests; no more are drawn from the iterable than there are free rows, and ``AHEAD``."""
        source, ended = iter(answers), False
        ahead = AHEAD if self.share_prefixes else 0
        while True:
            while not ended and len(self.queue) < self.rows.count(None) + ahead:
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
                self._cut_prefixes()
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

    def _growth(self, rows: list[int], tokens: int) -> np.ndarray:
        """Blocks that these rows allocate for at most so many more tokens each; a pair, as in ``block_counts``."""
        total = np.zeros(2, np.int64)
        for row in rows:
            answer = self._answer(row)
            total += self.room.growth(row, answer.request.policy, min(tokens, answer.tokens_left))
        return total

    def _unread(self) -> np.ndarray:
        """Blocks that the rest of the prompt being read, and its compression, may still take."""
        if self.prompt is None:
            return np.zeros(2, np.int64)
        prompt = self.prompt
        return np.array([prompt.peak + prompt.borrowed, 0]) + prompt.compressed - self.room.held(prompt.row)

    def _admit(self) -> Iterator[Event]:
        """Begins to read the first in the queue, where there is a row and room for its prompt."""
        answer, running = self.queue[0], self._running()
        request, config = answer.request, self.config
        if error := refusal(request, config):
            self.queue.popleft()
            yield Refused(request=answer.index, error=error)
            return
        if None not in self.rows:
            return
        reading = plan_reading(request, config)
        assert reading is not None
        kept, borrowed, lend = None, 0, 0
        if self.share_prefixes and reading.part == len(request.prompt):
            waiting = [other.request for other in self.queue][1:]
            kept, borrowed, lend = choose(self.prefixes, request, waiting, config.block_size)
        peak, grows = reading.peak, 0
        if request.policy is None:
            peak -= config.heads * borrowed
            grows = config.full_blocks(min(HORIZON, request.limit)) if running else 0
        elif peak + config.heads * lend < config.num_blocks:
            peak += config.heads * lend  # compressed is a copy
        else:
            lend = 0
        compressed = self.room.compressed(request.policy, len(request.prompt))
        need = np.array([peak + grows, 0]) + compressed + self._growth(running, HORIZON)
        if np.any(need > self.room.free):
            self._cut_prefixes(but=kept)
        if np.any(need > self.room.free):
            if not running:  # nothing but prefixes is in its way; then it reads by itself
                self._cut_prefixes()
            return
        self.queue.popleft()
        row = self.rows.index(None)
        self.rows[row] = answer
        self.joined += 1
        answer.begin(order=self.joined)
        if kept is not None:
            self.cache = self.steps.attach(self.cache, row, kept.prefix, borrowed)
            kept.borrowed[row] = borrowed
            self._look()
        read, lend = borrowed * config.block_size, lend * config.block_size
        self.borrowed_tokens += read
        state = self._begin_part(row, reading.part, read)
        self.prompt = Prompt(
            row=row,
            part=reading.part,
            chunk=min(CHUNK, -(-min(reading.part, len(request.prompt) - read) // 64) * 64),
            peak=peak,
            state=state,
            read=read,
            borrowed=config.heads * borrowed,
            lend=lend,
            compressed=compressed,
        )
        yield PromptRead(request=answer.index, tokens=read, total=len(request.prompt))

    def _begin_part(self, row: int, part: int, read: int) -> PromptState:
        request = self._answer(row).request
        return self.steps.start(
            self.cache, row, min(part, len(request.prompt) - read), request.policy, fresh=read < part
        )

    def _read_chunk(self) -> Iterator[Event]:
        """The next chunk of the prompt; after a part's last, compression; after the prompt's, first the first token."""
        assert self.prompt is not None
        prompt, row = self.prompt, self.prompt.row
        answer = self._answer(row)
        ids, total = answer.request.prompt, len(answer.request.prompt)
        end = min((prompt.read // prompt.part + 1) * prompt.part, total)
        began, compiled = time.perf_counter(), self.steps.compile_seconds
        stop = prompt.lend if prompt.read < prompt.lend else end
        tokens, count = chunk_of(ids[prompt.read : stop], prompt.chunk)
        self.cache, state = self.steps.chunk(self.cache, prompt.state, row, tokens, count, answer.request.policy)
        prompt.state = state
        prompt.read += count
        self.prompt_tokens += count
        jax.block_until_ready(state.hidden)
        answer.timings.spent("prefill", began, self.steps.compile_seconds - compiled)
        if prompt.read == prompt.lend:
            self.cache, prefix = self.steps.detach(self.cache, row)
            lent = Kept(tokens=ids[: prompt.lend], prefix=prefix)
            lent.borrowed[row] = lent.blocks
            self.prefixes.append(lent)
        yield PromptRead(request=answer.index, tokens=prompt.read, total=total)
        if prompt.read == end and answer.request.policy is not None and answer.request.policy.scorer.observes.rereads:
            state = self._reread(prompt, answer, end)
        if prompt.read == total:
            yield from self._finish_prompt(row, answer, state)
        elif prompt.read == end:
            yield from self._finish_part(prompt, answer)
        else:
            self._look()

    def _reread(self, prompt: Prompt, answer: Answer, end: int) -> PromptState:
        """Reads the part that ends there once more, for a policy that scores by what that attends to.

        Its chunks don't follow from what was borrowed, since the scores depend on them.
        """
        policy, part = answer.request.policy, prompt.part
        assert policy is not None
        began, compiled = time.perf_counter(), self.steps.compile_seconds
        size = min(CHUNK, -(-part // 64) * 64)
        for at in range((end - 1) // part * part, end, size):
            tokens, count = chunk_of(answer.request.prompt[at:end], size)
            prompt.state = self.steps.reread(self.cache, prompt.state, prompt.row, tokens, count, policy)
        jax.block_until_ready(prompt.state)
        answer.timings.spent("prefill", began, self.steps.compile_seconds - compiled)
        return prompt.state

    def _finish_part(self, prompt: Prompt, answer: Answer) -> Iterator[Event]:
        """Compresses what is read to what the whole prompt's budget leaves, and begins the next part."""
        policy, total = answer.request.policy, len(answer.request.prompt)
        assert policy is not None
        self.cache = self.steps.score(self.cache, prompt.state, prompt.row, policy)
        self._compress(prompt.row, tokens=total)
        held = int(self.room.held(prompt.row)[RAW])
        need = held + self.config.full_blocks(min(prompt.part, total - prompt.read))
        if need > prompt.peak:
            error = (
                f"the prompt holds {held} blocks once {prompt.read} of its {total} tokens are read and compressed, "
                f"so {need} with the next part, and may hold {prompt.peak}; protect less, or give more memory"
            )
            self._leave(prompt.row)
            yield Refused(request=answer.index, error=error)
            return
        prompt.state = self._begin_part(prompt.row, prompt.part, prompt.read)

    def _finish_prompt(self, row: int, answer: Answer, state: PromptState) -> Iterator[Event]:
        policy, sampler = answer.request.policy, sampler_for([answer.request.params])
        began, compiled = time.perf_counter(), self.steps.compile_seconds
        if policy is not None and self._give_up_prefix(row):
            self.cache = self.steps.own(self.cache, row)
        self.cache, token, logprob = self.steps.finish(self.cache, state, row, sampler, policy)
        first, logprob = int(token[0]), float(logprob[0])
        self.prompt = None
        answer.timings.spent("prefill", began, self.steps.compile_seconds - compiled)
        if policy is not None:
            self._compress(row)
        self._look()
        answer.cache = stats(self.cache.rows(jnp.array([row])))
        if error := self._too_large(row, answer):
            self._leave(row)
            yield Refused(request=answer.index, error=error)
            return
        yield from self._accept(row, [first], [logprob])

    def _too_large(self, row: int, answer: Answer) -> str | None:
        """Why an answer can't be given to a prompt that is read and compressed; None where it can."""
        held, more = self.room.held(row), self._growth([row], answer.request.limit)
        policy = answer.request.policy
        if policy is not None and held[RAW] > self.room.unquantised(policy):
            return (
                f"the prompt doesn't fit its {self.room.total[QUANTISED]} quantised blocks; give more cache_memory, "
                "a smaller budget, or shorten it"
            )
        for pool in np.flatnonzero(held + more > self.room.total):
            need = held[pool] + more[pool]
            return (
                f"the prompt holds {held[pool]} blocks once it is read, but {answer.request.limit} more tokens may "
                f"need {more[pool]}; {more_memory(self.config, int(need), quantised=pool == QUANTISED)}, or ask for "
                "fewer tokens"
            )
        return None

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
        steps = STEPS if self.prompt is None else STEPS_WHILE_READING
        while steps and np.any(self._growth(running, steps) > self.room.free - self._unread()):
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
        if not np.all(np.isfinite(logprobs)):
            self._leave(row)
            self.locked = False
            error = "the model's logits are not finite: its weights are damaged, or too large for their dtype"
            yield Refused(request=answer.index, error=error)
            return
        yield from answer.take(tokens, logprobs)
        if answer.finish_reason is not None:
            at_end = stats(self.cache.rows(jnp.array([row])))
            self._leave(row)
            self.locked = False
            yield answer.finished(at_end)

    def _make_room(self, running: list[int]) -> None:
        """Drops unused prefixes; else compresses what has outgrown its budget; else puts the youngest back."""
        before = self.room.free
        self._cut_prefixes()
        if np.any(self.room.free > before):
            return
        for row in running:
            policy = self._answer(row).request.policy
            if policy is not None and policy.compress_every is not None:
                self._compress(row)
        if np.any(self.room.free > before):
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
        self._give_up_prefix(row)
        self.rows[row] = None
        self.cache = self.steps.release(self.cache, jnp.arange(len(self.rows)) == row)
        self._look()

    def _cut_prefixes(self, *, but: Kept | None = None) -> None:
        """Gives back what of the prefixes nobody borrows."""
        for kept in [kept for kept in self.prefixes if kept is not but and kept.in_use < kept.blocks]:
            self.cache, kept.prefix = self.steps.cut(self.cache, kept.prefix, kept.in_use)
            kept.tokens = kept.tokens[: kept.blocks * self.config.block_size]
        self.prefixes = [kept for kept in self.prefixes if kept.blocks]
        self._look()

    def _give_up_prefix(self, row: int) -> bool:
        """A row borrows no longer; False where it did not."""
        return any(kept.borrowed.pop(row, 0) for kept in self.prefixes)

    def _look(self) -> None:
        """Reads back what the heads hold and what is free."""
        self.room.look(self.cache)


def _deciding(policy: Policy | None) -> Policy | None:
    """What a policy is for decoding: None where it neither observes it, nor compresses again, nor quantises."""
    return policy if policy is not None and policy.acts_in_decoding else None
