"""What a model is held as and computed in, where users say so and where they don't."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv.checks import shown
from jaxkv.words import DTYPES, WEIGHTS


def usual_dtype() -> jnp.dtype:
    """Of weights and cache where nobody says otherwise: what the platform is fast at."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def dtype_and_weights(dtype: DTypeLike | None, weights: str | None) -> tuple[jnp.dtype, str]:
    """What to compute in, and what ``models.load_model`` calls what weights are to be held as.

    Raises:
      ValueError: unknown weights, or floats of another dtype than ``dtype``.
    """
    chosen = jnp.dtype(usual_dtype() if dtype is None else dtype)
    if weights is None:
        return chosen, "floats" if jax.default_backend() == "cpu" else "stored"
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {shown(weights)}")
    if weights not in DTYPES:
        return chosen, weights
    if dtype is not None and chosen != jnp.dtype(weights):
        raise ValueError(f"weights={shown(weights)} are computed with in their own dtype, got dtype {chosen.name!r}")
    return jnp.dtype(weights), "floats"
