"""One sampler for a batch in which each row asks for its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkv.engine.sequence import Sequence as Answer
from jaxkv.generation.logits import Biased, Changed, Penalised
from jaxkv.generation.sampling import Forced, Greedy, Random, Sampler
from jaxkv.requests import MOST_LIKELIEST, SamplingParams

ALWAYS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Samplers:
    """Makes them; what no row asks for isn't in them, and costs nothing."""

    vocab_size: int
    chooses: Sampler | None = None
    """In place of drawing as the rows ask."""
    changes: Callable[[Array, Array], Array] | None = None
    """What becomes of logits before that."""

    def first(self, rows: Sequence[Answer]) -> Sampler:
        """For the first tokens of answers."""
        params = [row.request.params for row in rows]
        sampler = self.chooses or drawing(params)
        if any(p.logit_bias or (p.min_tokens and row.ends) for p, row in zip(params, rows, strict=True)):
            sampler = self._biased(sampler, rows)
        if self.changes is not None:
            sampler = Changed(sampler=sampler, change=self.changes)
        if any(p.penalises for p in params):
            sampler = self._penalised(sampler, rows)
        return sampler

    def next(self, rows: Sequence[Answer]) -> Sampler:
        """For those after it; rows that repeat what they said before they were put back are told what it was."""
        sampler = self.first(rows)
        longest = max(row.replaying for row in rows)
        if longest == 0:
            return sampler
        width = max(64, 1 << (longest - 1).bit_length())  # few different widths: each is a program of its own
        tokens, first = np.full((len(rows), width), -1, np.int32), np.zeros(len(rows), np.int32)
        for at, row in enumerate(rows):
            told = row.token_ids[row.replayed :][:width]
            tokens[at, : len(told)] = told
            first[at] = row.request.first_position + row.replayed
        return Forced(sampler=sampler, tokens=jnp.asarray(tokens), first=jnp.asarray(first))

    def _penalised(self, sampler: Sampler, rows: Sequence[Answer]) -> Sampler:
        prompt, counts = np.zeros((len(rows), self.vocab_size), bool), np.zeros((len(rows), self.vocab_size), np.int32)
        for at, row in enumerate(rows):
            prompt[at, row.request.prompt] = True
            np.add.at(counts[at], row.token_ids[: row.replayed], 1)
        repetition, presence, frequency = (
            jnp.array([getattr(row.request.params, f"{name}_penalty") for row in rows], jnp.float32)
            for name in ("repetition", "presence", "frequency")
        )
        return Penalised(
            sampler=sampler,
            prompt=jnp.asarray(prompt),
            counts=jnp.asarray(counts),
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )

    def _biased(self, sampler: Sampler, rows: Sequence[Answer]) -> Sampler:
        each = []
        for row in rows:
            params, ends = row.request.params, row.ends if row.request.params.min_tokens else ()
            until = row.request.first_position + params.min_tokens
            asked = [(int(i), b, ALWAYS) for i, b in dict(params.logit_bias).items()]
            each.append([*asked, *[(i, -np.inf, until) for i in ends]])
        width = 1 << (max(map(len, each)) - 1).bit_length()
        padded = [[*row, *[(self.vocab_size, 0.0, 0)] * (width - len(row))] for row in each]
        tokens, bias, until = ([[one[part] for one in row] for row in padded] for part in range(3))
        return Biased(
            sampler=sampler,
            tokens=jnp.array(tokens, jnp.int32),
            bias=jnp.array(bias, jnp.float32),
            until=jnp.array(until, jnp.int32),
        )


def drawing(rows: Sequence[SamplingParams]) -> Sampler:
    """As each row asks; the cheap one where all rows are greedy."""
    if all(p.temperature == 0 for p in rows):
        return Greedy()
    return Random(
        seed=jnp.array([p.seed for p in rows], jnp.uint32),
        temperature=jnp.array([p.temperature for p in rows], jnp.float32),
        top_k=jnp.array([p.top_k for p in rows], jnp.int32),
        top_p=jnp.array([p.top_p for p in rows], jnp.float32),
        min_p=jnp.array([p.min_p for p in rows], jnp.float32),
    )


def most_likeliest(rows: Sequence[Answer]) -> int:
    """How many alternatives a program tells: none where nobody asks, else all, so that one serves everybody."""
    return MOST_LIKELIEST if any(row.request.params.top_logprobs for row in rows) else 0
