"""Inside a TPU kernel: the parts of quantised blocks ``u32[blocks, rows, 128]`` as vectors.

``layout`` says what lies where. A part that has a value a token (meta, scores, positions) lies in the block as a line
that may begin at any lane; as a vector its tokens begin at lane 0, ``[blocks, 1, tokens]``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantised_block.layout import LANES, BlockLayout

SUBLANES = 8
"""Rows of a tile, in which a TPU keeps arrays of words."""


def check_layout(layout: BlockLayout) -> None:
    """Raises ValueError for blocks that the kernels can't read."""
    if layout.head_dim not in (64, 128):
        raise ValueError(
            f"on a TPU quantised heads have 64 or 128 values, not {layout.head_dim}: pad K and V to the next of them"
        )
    if layout.rows % SUBLANES:
        raise ValueError(
            f"a TPU keeps arrays in tiles of {SUBLANES} rows, not {layout.rows}: give the layout tile={SUBLANES}"
        )


def offset(bits: int, dtype: jnp.dtype) -> int:
    """By how much what ``unpack`` gives is more than the codes."""
    return 0 if dtype == jnp.float32 or bits == 8 else 128


def unpack(words: Array, bits: int, dtype: jnp.dtype) -> Array:
    """Codes and ``offset``, ``[blocks, rows * 32 / bits, 128]``, sides beside each other, of ``[blocks, rows, 128]``.

    A code of less than 8 bits below the exponent of 128 is 128 and the code in bfloat16, two of them a word.
    """
    rows = words.shape[1]
    words = lax.bitcast_convert_type(words, jnp.int32)
    past = -rows % SUBLANES
    if past:
        words = jnp.concatenate([words, jnp.zeros((words.shape[0], past, LANES), jnp.int32)], axis=1)
    mask = _twice(2**bits - 1)
    pairs = [words >> shift & mask for shift in range(0, 16, bits)]
    if bits == 8:
        parts = [_of_bytes(pair) for pair in pairs]
    else:
        parts = [pltpu.bitcast(pair | _twice(0x4300), jnp.bfloat16) for pair in pairs]
    if dtype == jnp.float32 or past:  # packed rows can't be cut off within a register
        parts = [part.astype(jnp.float32)[:, : 2 * rows] for part in parts]
    codes = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return codes - offset(bits, jnp.dtype(jnp.bfloat16)) if dtype == jnp.float32 else codes.astype(dtype)


def _of_bytes(pairs: Array) -> Array:
    """bfloat16 of whole numbers below 256, two to a word: float32 has no more in its other half."""
    low, high = (lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) for x in (pairs & 0xFFFF, pairs >> 16))
    return pltpu.bitcast(lax.shift_right_logical(low, jnp.int32(16)) | high, jnp.bfloat16)


def _twice(half: int) -> Array:
    """In both halves of a word."""
    return jnp.int32(half << 16 | half)


def halves(meta: Array) -> tuple[Array, Array]:
    """Scale, which is not negative, and minimum, float32, of words of meta: TPUs know no IEEE half precision."""
    meta = lax.bitcast_convert_type(meta, jnp.int32)
    low = lax.bitcast_convert_type(_from_half((meta & 0x7FFF0000) >> 3), jnp.int32)
    sign = meta & jnp.int32(-(2**31))
    return _from_half((meta & 0x7FFF) << 13), lax.bitcast_convert_type(low | sign, jnp.float32)


def _from_half(size: Array) -> Array:
    """Of exponent and fraction, already where float32 has them."""
    one = jnp.int32(1 << 23)
    bias = jnp.where(size >= 31 * one, 224 * one, 112 * one)  # 31: infinite or no number
    normal = lax.bitcast_convert_type(size + bias, jnp.float32)
    tiny = lax.bitcast_convert_type(size + 113 * one, jnp.float32) - 2.0**-14
    return jnp.where(size < one, tiny, normal)


def line(rows: Array, start: int, count: int) -> Array:
    """``count`` values from the ``start``-th on of rows ``[blocks, rows, 128]`` read as one line."""
    first, shift = divmod(start, LANES)
    chunks = -(-count // LANES)
    if shift == 0:
        parts = [rows[:, first + k : first + k + 1] for k in range(chunks)]
    else:
        last = -(-(start + count) // LANES)
        rolled = [pltpu.roll(rows[:, k : k + 1], LANES - shift, axis=2) for k in range(first, last)]
        rolled += rolled[-1:]  # what it gives is cut off
        lane = lax.broadcasted_iota(jnp.int32, rolled[0].shape, 2)
        parts = [jnp.where(lane < LANES - shift, *rolled[k : k + 2]) for k in range(chunks)]
    return jnp.concatenate(parts, axis=2)[..., :count]


def lay(rows: Array, start: int, values: Array) -> Array:
    """The reverse of ``line``: rows with ``[blocks, 1, count]`` values in them."""
    first, shift = divmod(start, LANES)
    count = values.shape[2]
    pad = -count % LANES
    if pad:
        values = jnp.concatenate([values, jnp.zeros((*values.shape[:2], pad), values.dtype)], axis=2)
    parts = [values[..., at : at + LANES] for at in range(0, count + pad, LANES)]
    if shift:
        parts = [pltpu.roll(part, shift, axis=2) for part in parts]
    found = []
    for row in range(rows.shape[1]):
        old, k = rows[:, row : row + 1], row - first
        lane = lax.broadcasted_iota(jnp.int32, old.shape, 2)
        at = (row * LANES + lane) - start
        if k * LANES < count + shift and k >= 0:
            new = parts[min(k, len(parts) - 1)]
            if shift and k > 0:
                new = jnp.where(lane < shift, parts[k - 1], new)
            old = jnp.where((at >= 0) & (at < count), new, old)
        found.append(old)
    return jnp.concatenate(found, axis=1)
