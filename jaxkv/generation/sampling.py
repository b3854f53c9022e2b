"""Choosing the next token: strategies over logits, each row of the batch with its own settings and seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Sampler(ABC):
    """A pytree that turns logits into tokens."""

    @abstractmethod
    def __call__(self, logits: Array, position: Array) -> Array:
        """Tokens ``i32[batch]`` from ``f32[batch, vocab]``; ``position`` ``i32[batch]`` varies the random draw."""

    def after(self, tokens: Array, made: Array) -> Sampler:
        """The sampler of the next step: of rows ``bool[batch]`` made it has chosen these tokens, ``i32[batch]``."""
        return self

    @staticmethod
    def of(chooses: Sampler | Callable[[Array, Array], Array] | None) -> Sampler:
        """A sampler as it is, a plain function of logits and positions as one; None: the greedy one."""
        if chooses is None:
            return Greedy()
        return chooses if isinstance(chooses, Sampler) else Function(function=chooses)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Greedy(Sampler):
    """The likeliest token; of equals, the first."""

    def __call__(self, logits: Array, position: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Function(Sampler):
    """A pure function of one's own: ``f32[batch, vocab]`` and positions ``i32[batch]`` -> ``i32[batch]``."""

    function: Callable[[Array, Array], Array] = field(metadata={"static": True})

    def __call__(self, logits: Array, position: Array) -> Array:
        return self.function(logits, position)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Random(Sampler):
    """Draws from what temperature, top-k, top-p and min-p leave; a row with temperature 0 is greedy.

    The draw depends only on a row's seed and position, so it is the same in any batch.
    """

    seed: Array
    """``u32[batch]``."""
    temperature: Array
    """``f32[batch]``."""
    top_k: Array
    """``i32[batch]``; 0: all."""
    top_p: Array
    """``f32[batch]``; 1: all."""
    min_p: Array
    """``f32[batch]``; 0: all."""

    def __call__(self, logits: Array, position: Array) -> Array:
        greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        below = logits - logits.max(axis=-1, keepdims=True)  # so that no quotient is infinite but those that lose
        scaled = below / jnp.where(self.temperature > 0, self.temperature, 1.0)[:, None]
        kept = restrict(scaled, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

        def draw(seed: Array, position: Array, row: Array) -> Array:
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

        drawn = jax.vmap(draw)(self.seed, position, kept).astype(jnp.int32)
        return jnp.where(self.temperature > 0, drawn, greedy)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Forced(Sampler):
    """Chooses what it is told where it is told something, and else what another sampler chooses."""

    sampler: Sampler
    tokens: Array
    """``i32[batch, told]``: the tokens at consecutive positions; -1 where nothing is told."""
    first: Array
    """``i32[batch]``: the position of each row's first."""

    def __call__(self, logits: Array, position: Array) -> Array:
        place = position - self.first
        told = jnp.take_along_axis(self.tokens, jnp.clip(place, 0, self.tokens.shape[1] - 1)[:, None], axis=1)[:, 0]
        is_told = (place >= 0) & (place < self.tokens.shape[1]) & (told >= 0)
        return jnp.where(is_told, told, self.sampler(logits, position))

    def after(self, tokens: Array, made: Array) -> Forced:
        return replace(self, sampler=self.sampler.after(tokens, made))


def restrict(logits: Array, *, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """Logits ``f32[batch, vocab]`` with the tokens that top-k, top-p or min-p exclude at minus infinity.

    Top-p keeps the fewest likeliest tokens whose probabilities reach ``top_p``; min-p those at least ``min_p`` times as
    likely as the likeliest. The likeliest always stays, and so does what ties with the last one kept.
    """
    vocab = logits.shape[-1]
    descending = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    rank = jnp.arange(vocab, dtype=jnp.int32)
    k = jnp.where(top_k > 0, top_k, vocab)[:, None]
    nucleus = (top_p[:, None] >= 1) | (before < top_p[:, None])
    likely = probability >= min_p[:, None] * probability[:, :1]
    kept = jnp.sum((rank < k) & nucleus & likely, axis=-1, dtype=jnp.int32)  # each excludes a suffix
    least = jnp.take_along_axis(descending, jnp.maximum(kept - 1, 0)[:, None], axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


class Chosen(NamedTuple):
    """The tokens of a step, with what the model thought of them."""

    tokens: Array
    """``i32[batch]``."""
    logprobs: Array
    """``f32[batch]``."""
    likeliest: Array
    """``i32[batch, top]``: the likeliest tokens, the likeliest first."""
    their_logprobs: Array
    """``f32[batch, top]``."""


def choose(sampler: Sampler, logits: Array, position: Array, top: int = 0) -> Chosen:
    """Lets a sampler choose; ``top`` is static."""
    tokens = sampler(logits, position)
    if top == 0:
        none = (*tokens.shape, 0)
        return Chosen(tokens, logprobs_of(logits, tokens), jnp.zeros(none, jnp.int32), jnp.zeros(none, jnp.float32))
    values, likeliest = lax.top_k(logits, top)
    values -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return Chosen(tokens, logprobs_of(logits, tokens), likeliest.astype(jnp.int32), values)


def logprobs_of(logits: Array, tokens: Array) -> Array:
    """Log probability of each row's token under the model, before any temperature, ``f32[batch]``."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
