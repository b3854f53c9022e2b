"""Turning vectors before they are quantised, so that no channel is much larger than the others (QuaRot, arXiv
2404.00456, section 4). Queries are turned with the keys, which leaves logits as they are, and what attention gives is
turned back."""

from functools import cache

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


@cache
def matrix(size: int) -> np.ndarray:
    """``f32[size, size]``: Sylvester's Hadamard matrix, orthonormal and symmetric, so its own inverse; of a size that
    is no power of two, of parts as large as the largest that divides it."""
    part = size & -size
    found = np.ones((1, 1))
    while len(found) < part:
        found = np.block([[found, found], [found, -found]])
    return np.kron(np.eye(size // part), found / np.sqrt(part)).astype(np.float32)


def turned(vectors: Array) -> Array:
    """Vectors ``[..., head_dim]`` times the matrix; twice is not at all."""
    by = jnp.asarray(matrix(vectors.shape[-1]))
    out = jnp.einsum("...d,de->...e", vectors.astype(jnp.float32), by, precision=lax.Precision.HIGHEST)
    return out.astype(vectors.dtype)
