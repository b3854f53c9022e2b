"""The quantiser of LeanKV (section 4.1): asymmetric and uniform, a scale and a minimum for each token's vector.

Codes are chosen with the float32 scale and minimum, and decoded with their half-precision roundings, as in the
authors' code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Codes(NamedTuple):
    """Quantised vectors."""

    codes: Array
    """``u32[..., head_dim]``, below ``2**bits``."""
    meta: Array
    """``u32[..., groups]``: scale and minimum."""


def quantize(vectors: Array, bits: int, groups: int = 1) -> Codes:
    """Quantises vectors ``[..., head_dim]``, each group of ``head_dim // groups`` values by itself.

    A group whose values are all equal decodes to that value in half precision.
    """
    parts = vectors.astype(jnp.float32).reshape(*vectors.shape[:-1], groups, -1)
    low, high = parts.min(-1, keepdims=True), parts.max(-1, keepdims=True)
    # A divisor that XLA can't see to be constant: it would multiply by the reciprocal, which rounds otherwise.
    scale = (high - low) / jnp.where(high >= low, 2.0**bits - 1, jnp.nan)
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0)
    codes = jnp.clip(jnp.round((parts - low) * inverse), 0, 2**bits - 1).astype(jnp.uint32)
    return Codes(codes.reshape(vectors.shape), _pack_meta(scale[..., 0], low[..., 0]))


def dequantize(quantized: Codes) -> Array:
    """``f32[..., head_dim]``."""
    scale, low = unpack_meta(quantized.meta)
    groups = scale.shape[-1]
    parts = as_float(quantized.codes).reshape(*quantized.codes.shape[:-1], groups, -1)
    return (parts * scale[..., None] + low[..., None]).reshape(quantized.codes.shape)


def as_float(codes: Array) -> Array:
    """Codes as float32; by way of signed integers, which processors convert faster."""
    return codes.astype(jnp.int32).astype(jnp.float32)


def _pack_meta(scale: Array, low: Array) -> Array:
    def bits(x: Array) -> Array:
        return lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16).astype(jnp.uint32)

    return bits(scale) | bits(low) << 16


def unpack_meta(meta: Array) -> tuple[Array, Array]:
    """Scale and minimum of each group, float32."""

    def half(bits: Array) -> Array:
        return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)

    return half(meta & 0xFFFF), half(meta >> 16)


def pack(codes: Array, bits: int, sides: int = 1) -> Array:
    """Codes ``u32[..., tokens, head_dim]`` as words ``u32[..., tokens * bits / 32, head_dim]``, ``sides`` in turn."""
    parts = codes.reshape(*codes.shape[:-2], sides, 16 // bits, -1, 2, codes.shape[-1])
    words = jnp.sum(parts << _shifts(bits), axis=(-4, -2), dtype=jnp.uint32)
    return jnp.swapaxes(words, -3, -2).reshape(*codes.shape[:-2], -1, codes.shape[-1])


def unpack(words: Array, bits: int, sides: int = 1) -> Array:
    """The reverse of ``pack``."""
    words = jnp.swapaxes(words.reshape(*words.shape[:-2], -1, sides, words.shape[-1]), -3, -2)
    parts = words[..., None, :, None, :] >> _shifts(bits) & jnp.uint32(2**bits - 1)
    return parts.reshape(*words.shape[:-3], -1, words.shape[-1])


def _shifts(bits: int) -> Array:
    """Of a word's codes, ``u32[codes of a half, 1, halves, 1]``."""
    shifts = jnp.arange(0, 16, bits, dtype=jnp.uint32)[:, None] + jnp.array([0, 16], jnp.uint32)
    return shifts[:, None, :, None]
