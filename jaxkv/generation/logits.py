"""Samplers that change the logits before another one chooses: what is there already, what must or mustn't come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array

from jaxkv.generation.sampling import Sampler


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Changed(Sampler):
    """By a function of one's own: ``f32[batch, vocab]`` and positions ``i32[batch]`` -> ``f32[batch, vocab]``."""

    sampler: Sampler
    change: Callable[[Array, Array], Array] = field(metadata={"static": True})

    def __call__(self, logits: Array, position: Array) -> Array:
        return self.sampler(self.change(logits, position), position)

    def after(self, tokens: Array, made: Array) -> Changed:
        return replace(self, sampler=self.sampler.after(tokens, made))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Penalised(Sampler):
    """By what the text has already.

    ``repetition`` is that of CTRL (arXiv 1909.05858), over prompt and answer; ``presence`` and ``frequency`` are those
    of OpenAI's API, over the answer alone.
    """

    sampler: Sampler
    prompt: Array
    """``bool[batch, vocab]``: tokens that the prompt has."""
    counts: Array
    """``i32[batch, vocab]``: how often the answer has each."""
    repetition: Array
    """``f32[batch]``; 1: nothing."""
    presence: Array
    """``f32[batch]``; 0: nothing."""
    frequency: Array
    """``f32[batch]``; 0: nothing."""

    def __call__(self, logits: Array, position: Array) -> Array:
        said, by = self.counts > 0, self.repetition[:, None]
        repeated = jnp.where(logits > 0, logits / by, logits * by)
        logits = jnp.where(self.prompt | said, repeated, logits)
        logits -= self.presence[:, None] * said + self.frequency[:, None] * self.counts
        return self.sampler(logits, position)

    def after(self, tokens: Array, made: Array) -> Penalised:
        counts = self.counts.at[jnp.arange(tokens.shape[0]), tokens].add(made.astype(jnp.int32))
        return replace(self, counts=counts, sampler=self.sampler.after(tokens, made))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Biased(Sampler):
    """By what each row adds to the logits of some tokens, until it has come to a position."""

    sampler: Sampler
    tokens: Array
    """``i32[batch, n]``; one past the vocabulary for none."""
    bias: Array
    """``f32[batch, n]``; minus infinity: never."""
    until: Array
    """``i32[batch, n]``: at this position and later it isn't added."""

    def __call__(self, logits: Array, position: Array) -> Array:
        row = jnp.arange(logits.shape[0])[:, None]
        bias = jnp.where(position[:, None] < self.until, self.bias, 0.0)
        return self.sampler(logits.at[row, self.tokens].add(bias, mode="drop"), position)

    def after(self, tokens: Array, made: Array) -> Biased:
        return replace(self, sampler=self.sampler.after(tokens, made))
