"""Ranking by integers: the order of floats with a place for what can't be taken, and the cheapest of each row."""

import jax.numpy as jnp
from jax import Array, lax

FIRST, KEPT = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
"""Sort keys of what comes before any score, and of what can't be taken: above that of any, +inf and NaN included."""


def sort_keys(scores: Array) -> Array:
    """Integers in the order of the floats: they sort several times faster on CPU, and -0.0 and NaN have a place."""
    scores = jnp.where(scores == 0, 0.0, scores.astype(jnp.float32))  # XLA takes x + 0.0 for x, which -0.0 is not
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    keys = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    return jnp.clip(keys, FIRST + 1, KEPT - 1)  # the NaN of GPUs has all bits set


def take_cheapest(keys: Array, count: Array, ascending: Array | None = None) -> Array:
    """Marks the ``count`` lowest keys of each row that are below ``KEPT``, ties by index: ``bool`` like ``keys``."""
    if ascending is None:
        ascending = jnp.sort(keys, axis=-1)
    bound = jnp.take_along_axis(ascending, jnp.clip(count - 1, 0, keys.shape[-1] - 1)[:, None], axis=-1)
    below = keys < bound
    level = keys == bound
    room = count - below.sum(-1, dtype=jnp.int32)
    level = level & (jnp.cumsum(level, axis=-1, dtype=jnp.int32) <= room[:, None])
    return (below | level) & (keys < KEPT) & (count > 0)[:, None]
