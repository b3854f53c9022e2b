"""A context is read once, compressed from a copy of its cache once a policy and ratio, and asked all its questions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from evaluation.tasks import Item, OfText, Reading
from jaxkv import CacheConfig, PagedCache, Policy, compress, init_cache, look_ahead, stats
from jaxkv.engine.programs import Programs, program
from jaxkv.generation.prefill import CHUNK
from jaxkv.generation.prompt import PromptState, observation_of
from models import Decoder

ROWS = 8  # questions that are read together
NEVER = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one item went."""

    item: str
    correct: float
    """Whether greedy decoding starts with the answer: each of its tokens is the likeliest after those before it. Of an
    answer that is written, its score, 0 to 1."""
    token_accuracy: float | None
    nll: float | None
    """Mean over the answer's tokens, nats; like ``token_accuracy`` None where the answer is written."""
    bytes_held: int
    """Blocks with scores and positions, and tables, of the cache that answered."""
    bytes_full: int
    """K and V of all tokens that the cache has seen, at 16 bits a value, and nothing else."""
    seconds_read: float
    """Reading and scoring what was compressed, shared by all items, tasks and ratios over it."""
    seconds_compress: float
    said: str = ""
    """The answer, where it is written."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A context in the cache, up to what the items are told."""

    cache: PagedCache
    prompt: PromptState | None
    """None: nothing was observed, so any policy may go on that observes nothing of it."""
    tokens: tuple[int, ...]
    """The whole context."""
    seen: int
    """Of its tokens that are read."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A cache that answers."""

    cache: PagedCache
    read: float
    """Seconds of reading and scoring."""
    compress: float
    nll: float | None = None
    """Of the text, nats a token, where that was told while it was read."""


class Runner(Programs):
    """A model and a cache of one row, whose K and V are bfloat16: the bytes reported are those that it holds."""

    def __init__(self, model: Decoder, max_context: int, block_size: int = 16):
        super().__init__(model)
        self._sizes = model.sizes
        self._config = partial(
            CacheConfig.for_model,
            model.sizes,
            batch=1,
            max_context=-(-max_context // CHUNK) * CHUNK,
            block_size=block_size,
            dtype=jnp.bfloat16,  # pyright: ignore[reportArgumentType]
        )

    @program(static=("policy",))
    def _shrink(self, cache: PagedCache, policy: Policy, room: Array) -> PagedCache:
        """A copy within so many blocks, ``i32[1]``."""
        return compress(cache, policy, room=room)

    @program()
    def _ask(self, cache: PagedCache, tokens: Array, places: Array) -> tuple[Array, Array]:
        """Likeliest token at, and log probability of, each place, ``i32[rows, answer]``; -1: none."""
        hidden = look_ahead(self.model, cache, tokens)
        before = jnp.take_along_axis(hidden, jnp.maximum(places - 1, 0)[..., None], axis=1)
        logits = self.model.logits(before)
        told = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), told[..., None], axis=-1)[..., 0]
        return logits.argmax(-1), logprob

    def read(self, tokens: Sequence[int], policy: Policy | None, *, keep_back: int = 0) -> Read:
        """Reads a context, but for its last ``keep_back`` tokens, which may be observed with what follows."""
        began, compiled = time.perf_counter(), self.compile_seconds
        seen = max(len(tokens) - keep_back, 0)
        shared = observation_of(policy).shareable(len(tokens)) >= seen
        cache = init_cache(self.config(policy))
        by = None if shared else policy
        prompt = self.start(cache, 0, NEVER, by, fresh=True)
        cache, prompt = jax.block_until_ready(self._read(cache, prompt, tokens[:seen], by))
        seconds = time.perf_counter() - began - (self.compile_seconds - compiled)
        prompt = None if shared else prompt
        return Read(cache=cache, prompt=prompt, tokens=tuple(tokens), seen=seen, seconds=seconds)

    def scored(self, read: Read, told: Sequence[int], policy: Policy | None) -> tuple[PagedCache, float]:
        """The cache of the context and what else is told before compression, scored; and seconds, reading's too."""
        began, compiled = time.perf_counter(), self.compile_seconds
        tokens = [*read.tokens, *told]
        cache, prompt = jax.tree.map(jnp.copy, (read.cache, read.prompt))  # the steps donate theirs
        prompt = prompt or self.start(cache, 0, NEVER, policy, fresh=True)
        prompt = replace(prompt, end=jnp.array([len(tokens)]), lengths=jnp.array([len(tokens)]))
        cache, prompt = self._read(cache, prompt, tokens[read.seen :], policy)
        if policy is not None:
            if policy.scorer.observes.rereads:
                for part, count in chunks(tokens):
                    prompt = self.reread(cache, prompt, 0, part, count, policy)
            cache = self.score(cache, prompt, 0, policy)
        jax.block_until_ready(cache)
        return cache, read.seconds + time.perf_counter() - began - (self.compile_seconds - compiled)

    def compressed(
        self, read: Read, told: Sequence[int], reading: Reading, policy: Policy | None, ratios: Sequence[float]
    ) -> Iterator[tuple[float, Compressed]]:
        """The context and what else is told before compression, read and compressed at each ratio; whole."""
        full, seconds = self.scored(read, told, policy)
        for ratio in ratios:
            small, spent = (full, 0.0) if policy is None else self.shrunk(full, policy, ratio)
            yield ratio, Compressed(cache=small, read=seconds, compress=spent)

    def reads_whole(self, reading: Reading, policy: Policy | None) -> bool:
        """Whether ``compressed`` goes on from what ``read`` has read."""
        return True

    def _read(
        self, cache: PagedCache, prompt: PromptState, tokens: Sequence[int], policy: Policy | None
    ) -> tuple[PagedCache, PromptState]:
        for part, count in chunks(tokens):
            cache, prompt = self.chunk(cache, prompt, 0, part, count, policy)
        return cache, prompt

    def shrunk(self, cache: PagedCache, policy: Policy, ratio: float) -> tuple[PagedCache, float]:
        """A copy that holds, tables and all, at most a ``ratio``-th of the full cache's bytes; and the seconds.

        Raises:
          ValueError: what must stay takes more.
        """
        tokens = int(cache.num_tokens[0])
        blocks = self.blocks(policy, ratio, tokens)
        began, compiled = time.perf_counter(), self.compile_seconds
        small = jax.block_until_ready(self._shrink(cache, policy, jnp.array([blocks])))
        seconds = time.perf_counter() - began - (self.compile_seconds - compiled)
        self.check_held(stats(small).bytes_held, ratio, tokens)
        return small, seconds

    def blocks(self, policy: Policy, ratio: float, tokens: int) -> int:
        """That a text of so many tokens may hold beside its tables, of ``placement.block_bytes`` each."""
        config = self.config(policy)
        layout = config.tiers and config.tiers.layout
        size = config.block_bytes if layout is None else layout.block_bytes
        return max(int(tokens * self.token_bytes / ratio - config.table_bytes), 0) // size

    def check_held(self, held: int, ratio: float, tokens: int) -> None:
        """Raises ValueError where what must stay takes more."""
        room = tokens * self.token_bytes / ratio
        if held > room:
            raise ValueError(
                f"ratio {ratio:g} leaves room for {room:.0f} bytes, but of {tokens} tokens what is protected, one "
                f"block a head and the tables take {held}; choose a smaller ratio or longer contexts"
            )

    def bytes_full(self, cache: PagedCache) -> int:
        """K and V of each token, at 16 bits a value."""
        return int(cache.num_tokens[0]) * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """K and V of a token at 16 bits a value, all heads together."""
        return self._sizes.num_layers * self._sizes.num_kv_heads * 2 * self._sizes.head_dim * 2

    def config(self, policy: Policy | None) -> CacheConfig:
        """Sizes of the cache that a policy needs."""
        return self._config(layout=policy and policy.placement.layout(self._sizes.head_dim))

    def of_text(self, small: Compressed, item: OfText) -> Outcome:
        """What the model thought of the text."""
        held, full = stats(small.cache).bytes_held, self.bytes_full(small.cache)
        return Outcome(
            item=item.id,
            correct=0.0,
            token_accuracy=0.0,
            nll=small.nll,
            bytes_held=held,
            bytes_full=full,
            seconds_read=small.read,
            seconds_compress=small.compress,
        )

    def ask(self, cache: PagedCache, items: Sequence[Item], *, read: float, compress: float) -> list[Outcome]:
        """Each question from the same cache, and its answer's tokens as the model would have them."""
        held, full = stats(cache).bytes_held, self.bytes_full(cache)
        outcomes = []
        for at in range(0, len(items), ROWS):
            some = items[at : at + ROWS]
            width = -(-max(len(i.question) + len(i.answer) for i in some) // 32) * 32
            longest = -(-max(len(i.answer) for i in some) // 8) * 8
            rows = ROWS if len(some) > 1 else 1  # few different shapes
            tokens, places = np.zeros((rows, width), np.int32), np.full((rows, longest), -1, np.int32)
            for row, item in enumerate(some):
                both = item.question + item.answer
                tokens[row, : len(both)] = both
                places[row, : len(item.answer)] = np.arange(len(item.question), len(both))
            best, logprob = jax.device_get(self._ask(cache, jnp.asarray(tokens), jnp.asarray(places)))
            for row, item in enumerate(some):
                right = best[row, : len(item.answer)] == np.array(item.answer)
                outcomes.append(
                    Outcome(
                        item=item.id,
                        correct=bool(right.all()),
                        token_accuracy=float(right.mean()),
                        nll=-float(logprob[row, : len(item.answer)].mean()),
                        bytes_held=held,
                        bytes_full=full,
                        seconds_read=read,
                        seconds_compress=compress,
                    )
                )
        return outcomes


def chunks(tokens: Sequence[int]) -> list[tuple[np.ndarray, int]]:
    """Tokens as ``i32[1, length]`` and how many are real; few different lengths, each of which is compiled."""
    parts = []
    for at in range(0, len(tokens), CHUNK):
        part = tokens[at : at + CHUNK]
        padded = np.zeros((1, CHUNK if len(part) > 128 else 128), np.int32)
        padded[0, : len(part)] = part
        parts.append((padded, len(part)))
    return parts
