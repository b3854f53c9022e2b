"""Contexts that are read a piece at a time under a budget: how ``evaluation.tasks`` says that they are to be read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from evaluation.scoring import NEVER, Compressed, Read, Runner, chunks
from evaluation.tasks import Continual, InParts, Reading
from jaxkv import PagedCache, Policy, Unlimited, compress, decode, init_cache, stats
from jaxkv.engine.programs import program
from jaxkv.generation.compress import compress_again
from jaxkv.generation.passes import ReadChunk
from jaxkv.generation.prompt import PromptState
from jaxkv.generation.sampling import Forced, Greedy


class Piecewise(Runner):
    """Also reads as the engine does: long prompts in parts; and long answers, of which each token is given.

    A piece attends to what is left of the text before it and to itself, then all is compressed to the same bytes: the
    answer's budget while it grows. Within a piece that is what decode steps do which are compressed again at its end;
    a policy that quantises each token at once is given real ones.
    """

    @program(donate=("cache", "prompt"), static=("policy",))
    def _force(
        self, cache: PagedCache, prompt: PromptState, tokens: ArrayLike, count: ArrayLike, policy: Policy | None
    ) -> tuple[PagedCache, PromptState, Array]:
        """A chunk of ``i32[length + 1]`` tokens but for the last: log probability of each after the first."""
        tokens = jnp.asarray(tokens)
        chunk = ReadChunk(self.model, cache, prompt, tokens.shape[0] - 1, jnp.reshape(count, 1), policy)
        state, hidden = self.model(tokens[None, :-1], chunk.positions, chunk.attend, chunk.state)
        cache, prompt = chunk.end(state, hidden)
        logprobs = jax.nn.log_softmax(self.model.logits(hidden)[0])
        return cache, prompt, jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)[:, 0]

    @program(donate=("cache",), static=("policy",))
    def _decode(
        self, cache: PagedCache, tokens: ArrayLike, count: ArrayLike, policy: Policy
    ) -> tuple[PagedCache, Array, Array]:
        """The same, a token a step; and how many were made."""
        tokens, limit = jnp.asarray(tokens), jnp.reshape(count, 1)
        steps, first = tokens.shape[0] - 1, cache.num_tokens + 1
        sampler = Forced(sampler=Greedy(), tokens=tokens[None, 1:], first=first)
        made = decode(self.model, cache, tokens[:1], limit, steps=steps, policy=policy, sampler=sampler)
        return made.cache, made.logprobs[0], made.counts[0]

    @program(donate=("cache",), static=("policy", "again"))
    def _within(self, cache: PagedCache, policy: Policy, room: ArrayLike, tokens: ArrayLike, again: bool) -> PagedCache:
        """Compressed to so many blocks, of a text of so many tokens in the end."""
        if again:
            return compress_again(cache, policy, room=jnp.reshape(room, 1))
        return compress(cache, policy, room=jnp.reshape(room, 1), tokens=jnp.reshape(tokens, 1))

    def reads_whole(self, reading: Reading, policy: Policy | None) -> bool:
        evicts = policy is not None and not isinstance(policy.budget, Unlimited)
        return not isinstance(reading, Continual) and not (isinstance(reading, InParts) and evicts)

    def compressed(
        self, read: Read, told: Sequence[int], reading: Reading, policy: Policy | None, ratios: Sequence[float]
    ) -> Iterator[tuple[float, Compressed]]:
        if self.reads_whole(reading, policy):
            yield from super().compressed(read, told, reading, policy, ratios)
            return
        tokens = [*read.tokens, *told]
        for ratio in ratios:
            if isinstance(reading, Continual):
                yield ratio, self._forced(tokens, reading.every, policy, ratio)
            elif isinstance(reading, InParts) and policy is not None:
                yield ratio, self._in_parts(tokens, reading, policy, ratio)

    def _in_parts(self, tokens: Sequence[int], reading: InParts, policy: Policy, ratio: float) -> Compressed:
        """As the engine reads a prompt where the pool holds ``1 / reading.pools`` of it: parts as large as the pool
        takes beside what is kept of those before."""
        total, began, compiled, spent = len(tokens), time.perf_counter(), self.compile_seconds, 0.0
        part = int(total * (1 / reading.pools - 1 / ratio))
        if part < 64:
            raise ValueError(
                f"ratio {ratio:g} leaves no room for parts in a pool of 1/{reading.pools:g} of the text; give a larger "
                "ratio"
            )
        part = -(-total // -(-total // part))
        cache = init_cache(self.config(policy))
        for at in range(0, total, part):
            piece = tokens[at : at + part]
            prompt = self.start(cache, 0, len(piece), policy, fresh=at == 0)
            cache, prompt = self._read(cache, prompt, piece, policy)
            if policy.scorer.observes.rereads:
                for ids, count in chunks(piece):
                    prompt = self.reread(cache, prompt, 0, ids, count, policy)
            cache = jax.block_until_ready(self.score(cache, prompt, 0, policy))
            cache, seconds = self._squeeze(cache, policy, ratio, total, again=False)
            spent += seconds
        seconds = time.perf_counter() - began - (self.compile_seconds - compiled) - spent
        return Compressed(cache=cache, read=seconds, compress=spent)

    def _forced(self, tokens: Sequence[int], every: int, policy: Policy | None, ratio: float) -> Compressed:
        total, began, compiled, spent = len(tokens), time.perf_counter(), self.compile_seconds, 0.0
        if policy is not None:
            policy = replace(policy, compress_every=every)  # refused where it can't rank what is decoded
        cache, told = init_cache(self.config(policy)), []
        for at in range(0, total, every):
            piece, count = np.zeros(every + 1, np.int32), min(every, total - at)
            piece[: min(every + 1, total - at)] = tokens[at : at + every + 1]
            if at and policy is not None and policy.placement.quantises_decoding:
                cache, logprobs = self._stepwise(cache, piece, count, policy)
            else:
                prompt = self.start(cache, 0, count, policy, fresh=at == 0)
                cache, prompt, logprobs = self._force(cache, prompt, piece, count, policy)
                if policy is not None:
                    cache = self.score(cache, prompt, 0, policy)
            told.append(np.asarray(logprobs)[: min(every, total - at - 1)])
            if policy is not None:
                cache, seconds = self._squeeze(cache, policy, ratio, total, again=at > 0)
                spent += seconds
        seconds = time.perf_counter() - began - (self.compile_seconds - compiled) - spent
        after_first = np.concatenate([told[0][-1:], *told[1:]])
        return Compressed(cache=cache, read=seconds, compress=spent, nll=-float(after_first.mean()))

    def _stepwise(self, cache: PagedCache, tokens: np.ndarray, count: int, policy: Policy) -> tuple[PagedCache, Array]:
        never = replace(policy, compress_every=NEVER)  # by itself: here it is given its bytes
        cache, logprobs, made = self._decode(cache, tokens, count, never)
        if int(made) != count:
            raise ValueError(f"the cache has no room for {count} more tokens; choose a larger ratio")
        return cache, logprobs

    def _squeeze(
        self, cache: PagedCache, policy: Policy, ratio: float, total: int, *, again: bool
    ) -> tuple[PagedCache, float]:
        """To the bytes that a text of so many tokens may hold, tables and all; and the seconds."""
        began, compiled = time.perf_counter(), self.compile_seconds
        cache = self._within(cache, policy, self.blocks(policy, ratio, total), total, again)
        jax.block_until_ready(cache)
        self.check_held(stats(cache).bytes_held, ratio, total)
        return cache, time.perf_counter() - began - (self.compile_seconds - compiled)
