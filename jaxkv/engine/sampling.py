"""One sampler for a batch in which each row asks for its own."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from jaxkv.engine.sequence import Sequence
from jaxkv.generation.sampling import Forced, Greedy, Random, Sampler
from jaxkv.requests import SamplingParams


def sampler_for(rows: Iterable[SamplingParams]) -> Sampler:
    """As each row asks; the cheap one where all rows are greedy."""
    rows = list(rows)
    if all(p.temperature == 0 for p in rows):
        return Greedy()
    return Random(
        seed=jnp.array([p.seed for p in rows], jnp.uint32),
        temperature=jnp.array([p.temperature for p in rows], jnp.float32),
        top_k=jnp.array([p.top_k for p in rows], jnp.int32),
        top_p=jnp.array([p.top_p for p in rows], jnp.float32),
        min_p=jnp.array([p.min_p for p in rows], jnp.float32),
    )


def replaying_sampler_for(rows: list[Sequence]) -> Sampler:
    """The same, but those that repeat what they said before they were put back are told what it was."""
    sampler = sampler_for(sequence.request.params for sequence in rows)
    longest = max(sequence.replaying for sequence in rows)
    if longest == 0:
        return sampler
    width = max(64, 1 << (longest - 1).bit_length())  # few different widths: each is a program of its own
    tokens, first = np.full((len(rows), width), -1, np.int32), np.zeros(len(rows), np.int32)
    for row, sequence in enumerate(rows):
        told = sequence.token_ids[sequence.replayed :][:width]
        tokens[row, : len(told)] = told
        first[row] = len(sequence.request.prompt) + sequence.replayed
    return Forced(sampler=sampler, tokens=jnp.asarray(tokens), first=jnp.asarray(first))
