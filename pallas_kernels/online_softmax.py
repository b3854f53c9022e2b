"""Attention over KVs that come some at a time, in plain XLA: the references' running softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.pool_values import IN_BOUNDS

MASKED = -1e30
"""A logit that counts for nothing; finite, so that a maximum over nothing gives exp(0) times a zero mask and no NaN."""


class Softmax(NamedTuple):
    """Of some of the KVs; the output is not yet divided by the sum."""

    maximum: Array
    """``f32[...]``: of the logits."""
    total: Array
    """``f32[...]``: of their exponentials, less the maximum."""
    output: Array
    """``f32[..., head_dim]``."""

    @classmethod
    def none(cls, *shape: int, head_dim: int) -> Softmax:
        """Of no KVs."""
        return cls(
            jnp.full(shape, MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, head_dim), jnp.float32),
        )

    def add(self, row: Array, logits: Array, held: Array, dot_values: Callable[[Array], Array]) -> Softmax:
        """With more KVs of some rows in it, where this is one of ``[rows, group]``.

        Args:
          row: ``i32[n]`` whose KVs each part has; one row may have several.
          logits: ``f32[n, group, kvs]``.
          held: ``bool[n, kvs]`` which of them are KVs.
          dot_values: weights like ``logits`` to what they make of the values, ``f32[n, group, head_dim]``.
        """
        maximum = self.maximum.at[row].max(logits.max(-1), mode=IN_BOUNDS)
        p = jnp.where(held[:, None], jnp.exp(logits - maximum[row][..., None]), 0.0)
        decay = jnp.exp(self.maximum - maximum)
        return Softmax(
            maximum,
            (self.total * decay).at[row].add(p.sum(-1), mode=IN_BOUNDS),
            (self.output * decay[..., None]).at[row].add(dot_values(p), mode=IN_BOUNDS),
        )

    def probabilities(self, row: Array, logits: Array, held: Array) -> Array:
        """Of KVs as ``add`` took them, with this the softmax over all and ``floored``."""
        p = jnp.exp(logits - self.maximum[row][..., None]) / self.total[row][..., None]
        return jnp.where(held[:, None], p, 0.0)

    def floored(self) -> Softmax:
        """With a sum that can be divided by: a row without KVs gives zeros."""
        return self._replace(total=jnp.maximum(self.total, jnp.finfo(jnp.float32).tiny))

    def normalised(self) -> Array:
        """The output ``f32[..., head_dim]``."""
        return self.output / self.total[..., None]


def merge(one: Softmax, other: Softmax) -> Softmax:
    """That over the KVs of both."""
    maximum = jnp.maximum(one.maximum, other.maximum)
    w1, w2 = jnp.exp(one.maximum - maximum), jnp.exp(other.maximum - maximum)
    return Softmax(
        maximum, one.total * w1 + other.total * w2, one.output * w1[..., None] + other.output * w2[..., None]
    )
