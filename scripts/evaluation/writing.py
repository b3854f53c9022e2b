"""Answers that the model writes, to be scored as a benchmark's authors do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from evaluation.metrics import score
from evaluation.scoring import NEVER, Outcome, Runner
from evaluation.tasks import Item, TaskSet, Written
from jaxkv import PagedCache, decode, stats
from jaxkv.engine.programs import program
from models import Decoder, Tokenizer


class Writer(Runner):
    """Asks by having the answer written, greedily; nothing that comes after the context is compressed."""

    def __init__(self, model: Decoder, tasks: TaskSet, tokenizer: Tokenizer):
        super().__init__(model, tasks.longest)
        self.tokenizer = tokenizer
        self.stops = {*model.sizes.eos_token_ids, *tokenizer.eos_ids}
        self.most = max(item.most_tokens for task in tasks.tasks for item in task.items if isinstance(item, Written))

    @program(donate=("cache",))
    def _write(
        self, cache: PagedCache, hidden: Array, first_not: Array, limit: Array
    ) -> tuple[PagedCache, Array, Array, Array]:
        """The cache, tokens ``i32[most]``, how many, and whether the cache ran out of room.

        ``hidden``, ``[1, hidden]``, is of the last token read. What ``first_not``, ``bool[vocab]``, says can't come
        first.
        """
        first = jnp.where(first_not, -jnp.inf, self.model.logits(hidden)).argmax(-1).astype(jnp.int32)
        stops = tuple(sorted(self.stops))
        rest = decode(
            self.model,
            cache,
            first,
            jnp.where(jnp.isin(first, jnp.array(stops, jnp.int32)), 0, limit - 1),
            steps=max(self.most - 1, 1),
            stop_tokens=stops,
        )
        tokens = jnp.concatenate([first, rest.tokens[0]])
        return rest.cache, tokens, 1 + rest.counts[0], rest.active[0]

    def ask(self, cache: PagedCache, items: Sequence[Item], *, read: float, compress: float) -> list[Outcome]:
        """Each question from the same cache, and what the model answers."""
        held, full = stats(cache).bytes_held, self.bytes_full(cache)
        outcomes = []
        for item in items:
            assert isinstance(item, Written)  # a benchmark has no others
            said = self.tokenizer.decode(self.write(cache, item))
            outcomes.append(
                Outcome(
                    item=item.id,
                    correct=score(item, said),
                    token_accuracy=None,
                    nll=None,
                    bytes_held=held,
                    bytes_full=full,
                    seconds_read=read,
                    seconds_compress=compress,
                    said=said,
                )
            )
        return outcomes

    def write(self, cache: PagedCache, item: Written) -> list[int]:
        """The answer's tokens, without the one that ends it."""
        cache = jax.tree.map(jnp.copy, cache)  # the steps donate theirs
        cache, prompt = self._read(cache, self.start(cache, 0, NEVER, None), item.question, None)
        stops = set(self.stops)
        if item.ends_line:
            stops.add(self.tokenizer.encode("\n", add_special=False)[-1])
        first_not = np.zeros(self._sizes.vocab_size, bool)
        first_not[list(stops)] = item.ends_line
        limits = jnp.asarray(first_not), jnp.array([item.most_tokens])
        _, *made = self._write(cache, prompt.hidden, *limits)
        tokens, count, full = jax.device_get(made)
        if full or not prompt.granted:
            raise ValueError(f"the cache has no room for item {item.id} and {item.most_tokens} tokens of an answer")
        return list(takewhile(lambda token: token not in stops, tokens[:count].tolist()))
