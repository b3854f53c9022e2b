"""Single KVs of quantised blocks as patches: for each row of 128 words that a KV has a part in, which bits are its own.

The rows of a KV are those of its K codes, its V codes, each word of its meta, its score and its position, in this
order; some of them may be the same row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantised_block.blocks import Tokens, locate
from pallas_kernels.quantised_block.layout import LANES, Segments
from pallas_kernels.quantised_block.quantizer import Codes, dequantize, quantize


class Patches(NamedTuple):
    """Of ``n`` KVs, ``m`` each."""

    rows: Array
    """``i32[n, m]`` within the block."""
    masks: Array
    """``u32[n, m, 128]``: the KV's own bits."""
    bits: Array
    """``u32[n, m, 128]``: what they are to be."""


class _Places(NamedTuple):
    """Where the parts of KVs are: word of a block's line, ``i32[n, m]``; codes are shifted so far, ``u32[n, 2]``."""

    words: Array
    shifts: Array


def patches(tokens: Tokens, offsets: Array, tier: Segments) -> Patches:
    """Those that put KVs, quantised, at ``offsets`` of their blocks, ``i32[n]``."""
    fmt, head_dim = tier.format, tokens.key.shape[-1]
    key = quantize(tokens.key, fmt.key_bits, fmt.key_groups)
    value = quantize(tokens.value, fmt.value_bits, fmt.value_groups)
    words, shifts = _places(offsets, tier, head_dim)
    lane = jnp.arange(LANES, dtype=jnp.int32) - (words % LANES)[..., None]

    codes = jnp.stack([key.codes, value.codes], axis=1) << shifts[..., None]
    ones = jnp.array([2**fmt.key_bits - 1, 2**fmt.value_bits - 1], jnp.uint32) << shifts
    of_codes = (lane[:, :2] >= 0) & (lane[:, :2] < head_dim)
    single = jnp.concatenate([key.meta, value.meta, _bits(tokens.scores), _bits(tokens.positions)], axis=1)
    of_single = lane[:, 2:] == 0
    return Patches(
        rows=words // LANES,
        masks=jnp.concatenate(
            [jnp.where(of_codes, ones[..., None], 0), jnp.where(of_single, jnp.uint32(0xFFFFFFFF), 0)], axis=1
        ),
        bits=jnp.concatenate(
            [
                jnp.where(of_codes, jnp.tile(codes, LANES // head_dim), 0),
                jnp.where(of_single, single[..., None], 0),
            ],
            axis=1,
        ),
    )


def take(pool: Array, blocks: Array, offsets: Array, tier: Segments, head_dim: int) -> Tokens:
    """KVs at ``offsets`` of ``blocks``, ``i32[n]`` each, of a pool ``u32[blocks, rows, 128]``, dequantised.

    A gather of whole rows, so the pool may be laid out in tiles.
    """
    fmt = tier.format
    words, shifts = _places(offsets, tier, head_dim)
    rows = blocks[:, None] * pool.shape[1] + words // LANES
    found = pool.reshape(-1, LANES).at[rows].get(mode="promise_in_bounds")
    lane = jnp.arange(LANES, dtype=jnp.int32) == (words % LANES)[..., None]
    single = jnp.sum(jnp.where(lane[:, 2:], found[:, 2:], 0), axis=-1, dtype=jnp.uint32)
    key_meta, value_meta, score, position = jnp.split(
        single, [fmt.key_groups, fmt.key_groups + fmt.value_groups, single.shape[1] - 1], axis=1
    )

    def codes(index: int, bits: int) -> Array:
        parts = found[:, index].reshape(-1, LANES // head_dim, head_dim)
        part = jnp.take_along_axis(parts, (words[:, index] % LANES // head_dim)[:, None, None], axis=1)[:, 0]
        return part >> shifts[:, index : index + 1] & jnp.uint32(2**bits - 1)

    return Tokens(
        key=dequantize(Codes(codes(0, fmt.key_bits), key_meta)),
        value=dequantize(Codes(codes(1, fmt.value_bits), value_meta)),
        scores=lax.bitcast_convert_type(score[:, 0], jnp.float32),
        positions=lax.bitcast_convert_type(position[:, 0], jnp.int32),
    )


def _places(offsets: Array, tier: Segments, head_dim: int) -> _Places:
    fmt, shifts, words = tier.format, [], []
    for start, bits in ((0, fmt.key_bits), (tier.value, fmt.value_bits)):
        vector, shift = locate(offsets, tier, bits)
        words.append(start + vector * head_dim)
        shifts.append(shift)
    lines = fmt.key_groups + fmt.value_groups + 2  # one value a token each
    words += [tier.key_meta + index * tier.tokens + offsets for index in range(lines)]
    return _Places(jnp.stack(words, axis=1), jnp.stack(shifts, axis=1))


def _bits(values: Array) -> Array:
    return lax.bitcast_convert_type(values, jnp.uint32)[:, None]
