"""Quantised blocks as arrays of their parts, and single tokens in them: the format of ``layout`` in plain XLA."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.quantised_block.layout import LANES, Segments
from pallas_kernels.quantised_block.quantizer import Codes, dequantize, pack, quantize, unpack


class Tokens(NamedTuple):
    """KVs with their score and position."""

    key: Array
    """``f32[..., head_dim]``."""
    value: Array
    scores: Array
    """``f32[...]``."""
    positions: Array
    """``i32[...]``."""


def encode(tokens: Tokens, tier: Segments, words: int) -> Array:
    """Whole blocks, ``u32[..., words]``, of ``[..., tier.tokens]`` KVs each, quantised."""
    fmt = tier.format
    key = quantize(tokens.key, fmt.key_bits, fmt.key_groups)
    value = quantize(tokens.value, fmt.value_bits, fmt.value_groups)
    shape = tokens.scores.shape[:-1]
    parts = [
        pack(key.codes, fmt.key_bits, tier.sides),
        pack(value.codes, fmt.value_bits, tier.sides),
        jnp.swapaxes(key.meta, -1, -2),
        jnp.swapaxes(value.meta, -1, -2),
        lax.bitcast_convert_type(tokens.scores, jnp.uint32),
        lax.bitcast_convert_type(tokens.positions, jnp.uint32),
        jnp.zeros((*shape, words - tier.end), jnp.uint32),
    ]
    return jnp.concatenate([part.reshape(*shape, -1) for part in parts], axis=-1)


def decode(words: Array, tier: Segments, head_dim: int) -> Tokens:
    """The KVs of blocks ``u32[..., words]``, dequantised: ``[..., tier.tokens]`` of them a block."""
    key, value = read_codes(words, tier, head_dim)
    return Tokens(dequantize(key), dequantize(value), read_scores(words, tier), read_positions(words, tier))


def read_codes(words: Array, tier: Segments, head_dim: int) -> tuple[Codes, Codes]:
    """K and V of blocks ``u32[..., words]``: codes ``[..., tokens, head_dim]`` and meta ``[..., tokens, groups]``."""
    fmt = tier.format

    def part(start: int, end: int, width: int) -> Array:
        return words[..., start:end].reshape(*words.shape[:-1], (end - start) // width, width)

    key, value = part(0, tier.value, head_dim), part(tier.value, tier.key_meta, head_dim)
    key_meta, value_meta = (
        part(tier.key_meta, tier.value_meta, tier.tokens),
        part(tier.value_meta, tier.scores, tier.tokens),
    )
    return (
        Codes(unpack(key, fmt.key_bits, tier.sides), jnp.swapaxes(key_meta, -1, -2)),
        Codes(unpack(value, fmt.value_bits, tier.sides), jnp.swapaxes(value_meta, -1, -2)),
    )


def read_scores(words: Array, tier: Segments) -> Array:
    """``f32[..., tokens]`` of blocks ``u32[..., words]``."""
    return lax.bitcast_convert_type(words[..., tier.scores : tier.positions], jnp.float32)


def read_positions(words: Array, tier: Segments) -> Array:
    """``i32[..., tokens]`` of blocks ``u32[..., words]``."""
    return lax.bitcast_convert_type(words[..., tier.positions : tier.end], jnp.int32)


def read_words(pool: Array, blocks: Array, start: int, end: int) -> Array:
    """Words ``start`` to ``end`` of blocks, ``u32[..., end - start]``, of a pool ``u32[blocks, rows, 128]``.

    Whole rows are read: where tiles of rows are a layout of their own, as on a TPU, to see the pool as lines of words
    would be to copy it.
    """
    rows = np.arange(start // LANES, -(-end // LANES))
    # Apart from the rest: fused with a write that follows, the read would cost a copy of the pool.
    read = lax.optimization_barrier(pool.at[blocks[..., None], rows].get(mode="promise_in_bounds"))
    first = rows[0] * LANES
    return read.reshape(*blocks.shape, -1)[..., start - first : end - first]


def write_words(pool: Array, blocks: Array, start: int, new: Array) -> Array:
    """The pool with the words from ``start`` on of blocks replaced; of blocks past its end nothing is. See
    ``read_words``."""
    rows = np.arange(start // LANES, -(-(start + new.shape[-1]) // LANES))
    first = rows[0] * LANES
    held = read_words(pool, jnp.minimum(blocks, pool.shape[0] - 1), first, first + rows.size * LANES)
    written = held.at[..., start - first : start - first + new.shape[-1]].set(new)
    return pool.at[blocks[..., None], rows].set(written.reshape(*blocks.shape, -1, LANES), mode="drop")


def read_tokens(pool: Array, blocks: Array, offsets: Array, tier: Segments, head_dim: int) -> Tokens:
    """KVs at ``offsets`` of ``blocks``, ``i32[n]`` each, of a pool ``u32[blocks, words]``, dequantised."""

    fmt = tier.format
    (key_row, key_shift), (value_row, value_shift) = (locate(offsets, tier, n) for n in (fmt.key_bits, fmt.value_bits))
    lines = jnp.arange(fmt.key_groups + fmt.value_groups + 2, dtype=jnp.int32) * tier.tokens  # a value a token each
    at = [
        (key_row * head_dim)[:, None] + jnp.arange(head_dim, dtype=jnp.int32),
        (tier.value + value_row * head_dim)[:, None] + jnp.arange(head_dim, dtype=jnp.int32),
        (tier.key_meta + offsets)[:, None] + lines,
    ]
    # One gather: what is written afterwards then follows all that is read, and the pool need not be copied.
    words = lax.optimization_barrier(
        pool.at[blocks[:, None], jnp.concatenate(at, axis=1)].get(mode="promise_in_bounds")
    )
    ends = np.cumsum([head_dim, head_dim, fmt.key_groups, fmt.value_groups, 1])
    key, value, key_meta, value_meta, scores, positions = jnp.split(words, ends, axis=1)

    def codes(words: Array, shift: Array, bits: int) -> Array:
        return words >> shift[:, None] & jnp.uint32(2**bits - 1)

    return Tokens(
        key=dequantize(Codes(codes(key, key_shift, fmt.key_bits), key_meta)),
        value=dequantize(Codes(codes(value, value_shift, fmt.value_bits), value_meta)),
        scores=lax.bitcast_convert_type(scores[:, 0], jnp.float32),
        positions=lax.bitcast_convert_type(positions[:, 0], jnp.int32),
    )


def write_tokens(pool: Array, blocks: Array, offsets: Array, tokens: Tokens, tier: Segments) -> Array:
    """The pool with single KVs quantised into their slots; every other token keeps its bits. See ``read_tokens``.

    No two of ``blocks`` may be the same, but for the null block.
    """
    head_dim = tokens.key.shape[-1]

    def write(pool: Array, vectors: Array, start: int, meta: int, bits: int, groups: int) -> Array:
        quantized = quantize(vectors, bits, groups)
        row, shift = locate(offsets, tier, bits)
        at, shift = start + row * head_dim, shift[:, None]
        # Apart from the write: fused with it, the read would cost a copy of the pool.
        kept = lax.optimization_barrier(_read(pool, blocks, at, head_dim)) & ~(jnp.uint32(2**bits - 1) << shift)
        pool = _write(pool, blocks, at, kept | quantized.codes << shift)
        for group in range(groups):
            pool = _write(pool, blocks, meta + group * tier.tokens + offsets, quantized.meta[:, group : group + 1])
        return pool

    fmt = tier.format
    pool = write(pool, tokens.key, 0, tier.key_meta, fmt.key_bits, fmt.key_groups)
    pool = write(pool, tokens.value, tier.value, tier.value_meta, fmt.value_bits, fmt.value_groups)
    scores = lax.bitcast_convert_type(tokens.scores, jnp.uint32)[:, None]
    positions = lax.bitcast_convert_type(tokens.positions, jnp.uint32)[:, None]
    pool = _write(pool, blocks, tier.scores + offsets, scores)
    return _write(pool, blocks, tier.positions + offsets, positions)


def locate(offsets: Array, tier: Segments, bits: int) -> tuple[Array, Array]:
    """Where a token's codes are: which vector of words, ``i32[...]``, and how far they are shifted, ``u32[...]``."""
    a_side = tier.tokens // tier.sides
    side, index = offsets // a_side, offsets % a_side
    of_slot = a_side * bits // 16  # tokens in the lowest codes of all halves, or in the next
    shift = index % 2 * 16 + index // of_slot * bits
    return index % of_slot // 2 * tier.sides + side, shift.astype(jnp.uint32)


def _read(pool: Array, blocks: Array, starts: Array, size: int) -> Array:
    return lax.gather(
        pool,
        jnp.stack([blocks, starts], axis=-1),
        lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)),
        slice_sizes=(1, size),
        mode="promise_in_bounds",
    )


def _write(pool: Array, blocks: Array, starts: Array, new: Array) -> Array:
    return lax.scatter(
        pool,
        jnp.stack([blocks, starts], axis=-1),
        new,
        lax.ScatterDimensionNumbers(
            update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
        ),
        mode="promise_in_bounds",
    )
