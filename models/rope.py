"""Rotary position embedding in the "rotate half" convention: dimension i is paired with i + head_dim / 2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from models.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A context extension that slows the rotation of some pairs: pair i turns ``divisors[i]`` times slower.

    Linear interpolation, Llama 3.1's frequency-dependent scaling and the factors in a GGUF file all have this form.
    """

    divisors: tuple[float, ...]
    """``[head_dim / 2]``."""

    def __post_init__(self):
        if not all(math.isfinite(divisor) and divisor > 0 for divisor in self.divisors):
            raise CheckpointError(f"RoPE divisors must be positive and finite, got {self.divisors}")

    @classmethod
    def linear(cls, *, head_dim: int, factor: float) -> RopeScaling:
        """Position interpolation: every pair turns ``factor`` times slower."""
        return cls(divisors=(factor,) * (head_dim // 2))

    @classmethod
    def llama3(
        cls,
        *,
        head_dim: int,
        theta: float,
        factor: float,
        low_freq_factor: float,
        high_freq_factor: float,
        original_max_context: int,
    ) -> RopeScaling:
        """Llama 3.1: slow wavelengths longer than original / low by ``factor``, keep those shorter than original /
        high, and blend the frequencies in between."""
        if factor <= 0 or high_freq_factor <= low_freq_factor:
            raise CheckpointError(
                f"llama3 RoPE scaling needs factor > 0 and high_freq_factor > low_freq_factor, got "
                f"{factor=}, {low_freq_factor=}, {high_freq_factor=}"
            )
        turns = original_max_context * _frequencies(head_dim, theta) / (2 * np.pi)
        kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        return cls(divisors=tuple((1 / (kept + (1 - kept) / factor)).tolist()))


def rotation(positions: Array, *, head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Array, Array]:
    """Cosine and sine of each pair's angle, both ``f32[batch, length, 1, head_dim / 2]``.

    Args:
      positions: ``i32[batch, length]``.
    """
    frequencies = _frequencies(head_dim, theta)
    if scaling is not None:
        frequencies = frequencies / np.asarray(scaling.divisors)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rotated_by: tuple[Array, Array]) -> Array:
    """Turn each pair of ``x``, ``[batch, length, heads, head_dim]``, by its angle, in float32; x's dtype comes out."""
    cos, sin = rotated_by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Radians a position, ``f64[head_dim / 2]``."""
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)
