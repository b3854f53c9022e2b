"""GGUF's blocks as codes with scales, in the bits that they have in the file (llama.cpp's ggml-quants)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as Kind

from models.quantised import Grouped, in_bits

Made = Callable[[np.ndarray], Grouped]


def kept(kind: Kind) -> Made | None:
    """What makes a matrix of the rows' blocks ``u8[out, blocks, bytes]``; None: such blocks aren't kept as they are."""
    return _MADE.get(kind)


def _floats(blocks: np.ndarray, start: int) -> np.ndarray:
    """``f16[out, blocks]``."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0]


def _rows(codes: np.ndarray) -> np.ndarray:
    """``[out, blocks, …]`` as ``[out, in]``."""
    return codes.reshape(len(codes), -1)


def _matrix(codes: np.ndarray, scales: object, size: int, *, bits: int = 8, **more: object) -> Grouped:
    """``size``: codes that share a scale."""
    return Grouped(axis=1, codes=in_bits(_rows(codes), bits, axis=1), scales=scales, block=(1, size), **more)


def _middle(value: int) -> np.ndarray:
    return np.full((1, 1), value, np.int8)


def _halves(data: np.ndarray) -> np.ndarray:
    """Low nibbles, then high ones."""
    return np.concatenate([data & 15, data >> 4], -1)


def _q8_0(blocks: np.ndarray) -> Grouped:
    return _matrix(blocks[..., 2:].view(np.int8), _floats(blocks, 0), 32)


def _q4_0(blocks: np.ndarray) -> Grouped:
    return _matrix(_halves(blocks[..., 2:]), _floats(blocks, 0), 32, bits=4, zeros=_middle(8))


def _q4_1(blocks: np.ndarray) -> Grouped:
    return _matrix(_halves(blocks[..., 4:]), _floats(blocks, 0), 32, bits=4, offsets=_floats(blocks, 2))


def _fifth(bits: np.ndarray) -> np.ndarray:
    """The fifth bits of 32 codes, of 4 bytes, at their place."""
    return np.unpackbits(bits, axis=-1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: np.ndarray) -> Grouped:
    codes = _halves(blocks[..., 6:]) | _fifth(blocks[..., 2:6])
    return _matrix(codes, _floats(blocks, 0), 32, bits=5, zeros=_middle(16))


def _q5_1(blocks: np.ndarray) -> Grouped:
    codes = _halves(blocks[..., 8:]) | _fifth(blocks[..., 4:8])
    return _matrix(codes, _floats(blocks, 0), 32, bits=5, offsets=_floats(blocks, 2))


def _scales_and_offsets(blocks: np.ndarray) -> tuple[Grouped, Grouped]:
    """Of 8 groups of 32 a block: 6 bits each, in 12 bytes, with one factor a block for all scales and one for all
    offsets, which are subtracted."""
    packed = blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], -1)
    offsets = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], -1)
    return _matrix(scales, _floats(blocks, 0), 8), _matrix(offsets, -_floats(blocks, 2), 8)


def _low_nibbles(data: np.ndarray, run: int) -> np.ndarray:
    """``[out, blocks, codes]``: of each run of bytes first the low nibbles, then the high ones."""
    return _halves(data.reshape(*data.shape[:2], -1, run)).reshape(*data.shape[:2], -1)


def _q4_k(blocks: np.ndarray) -> Grouped:
    scales, offsets = _scales_and_offsets(blocks)
    return _matrix(_low_nibbles(blocks[..., 16:], 32), scales, 32, bits=4, offsets=offsets)


def _q5_k(blocks: np.ndarray) -> Grouped:
    scales, offsets = _scales_and_offsets(blocks)
    high = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit j: of group j
    codes = _low_nibbles(blocks[..., 48:], 32) | high.reshape(*high.shape[:2], -1) << 4
    return _matrix(codes, scales, 32, bits=5, offsets=offsets)


def _q6_k(blocks: np.ndarray) -> Grouped:
    low = _low_nibbles(blocks[..., :128], 64)
    halves = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)  # each of 128 codes, in four runs of 32
    high = halves >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = low | high.reshape(*low.shape) << 4
    scales = _matrix(blocks[..., 192:208].view(np.int8), _floats(blocks, 208), 16)
    return _matrix(codes, scales, 16, bits=6, zeros=_middle(32))


_MADE: dict[Kind, Made] = {
    Kind.Q8_0: _q8_0,
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}
