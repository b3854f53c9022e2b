"""Blocks of two tiers in plain numpy, a token at a time, and attention over them in float64."""

from typing import NamedTuple

import numpy as np

from oracles.attention import _softmax


class Tokens(NamedTuple):
    key: np.ndarray
    """``f32[tokens, head_dim]``."""
    value: np.ndarray
    scores: np.ndarray
    positions: np.ndarray


def quantize(vector, bits, groups):
    """Codes ``u32[head_dim]``, and scale and minimum in half precision, ``[groups]`` each."""
    codes, scales, minima = [], [], []
    for part in np.split(vector.astype(np.float32), groups):
        low = part.min()
        scale = (part.max() - low) / np.float32(2**bits - 1)
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        codes.append(np.clip(np.rint((part - low) * inverse), 0, 2**bits - 1).astype(np.uint32))
        scales.append(np.float16(scale))
        minima.append(np.float16(low))
    return np.concatenate(codes), np.array(scales), np.array(minima)


def dequantize(codes, scales, minima):
    parts = np.split(codes.astype(np.float32), len(scales))
    return np.concatenate([c * np.float32(s) + np.float32(m) for c, s, m in zip(parts, scales, minima, strict=True)])


class Block:
    """A block's words, and its tokens by their places in it."""

    def __init__(self, words, fmt, tokens, head_dim):
        """``words``: ``u32[words]``, changed in place."""
        self.words, self.fmt, self.tokens, self.head_dim = words, fmt, tokens, head_dim
        self.sides = 128 // head_dim if head_dim == 64 else 1
        values = tokens * head_dim // 32
        self.value = values * fmt.key_bits
        self.key_meta = self.value + values * fmt.value_bits
        self.value_meta = self.key_meta + tokens * fmt.key_groups
        self.scores = self.value_meta + tokens * fmt.value_groups

    def _codes_at(self, start, bits, token):
        a_side = self.tokens // self.sides
        rows = a_side * bits // 32
        side, token = divmod(token, a_side)
        turn, token = divmod(token, 2 * rows)
        row, half = divmod(token, 2)
        at = start + (row * self.sides + side) * self.head_dim
        return slice(at, at + self.head_dim), np.uint32(16 * half + turn * bits)

    def put(self, token, key, value, score, position):
        fmt = self.fmt
        for vector, start, meta, bits, groups in (
            (key, 0, self.key_meta, fmt.key_bits, fmt.key_groups),
            (value, self.value, self.value_meta, fmt.value_bits, fmt.value_groups),
        ):
            codes, scales, minima = quantize(vector, bits, groups)
            where, shift = self._codes_at(start, bits, token)
            mask = np.uint32((2**bits - 1) << int(shift))
            self.words[where] = self.words[where] & ~mask | codes << shift
            for group in range(groups):
                both = np.array([scales[group], minima[group]]).view(np.uint32)[0]
                self.words[meta + group * self.tokens + token] = both
        self.words[self.scores + token] = np.float32(score).view(np.uint32)
        self.words[self.scores + self.tokens + token] = np.uint32(position)

    def get(self, token):
        fmt, found = self.fmt, []
        for start, meta, bits, groups in (
            (0, self.key_meta, fmt.key_bits, fmt.key_groups),
            (self.value, self.value_meta, fmt.value_bits, fmt.value_groups),
        ):
            where, shift = self._codes_at(start, bits, token)
            codes = self.words[where] >> shift & np.uint32(2**bits - 1)
            halves = self.words[[meta + group * self.tokens + token for group in range(groups)]].view(np.float16)
            found.append(dequantize(codes, halves[::2], halves[1::2]))
        score = self.words[self.scores + token].view(np.float32)
        return (*found, score, self.words[self.scores + self.tokens + token].view(np.int32))

    def read(self, tokens):
        """The first so many."""
        key, value, scores, positions = zip(*(self.get(token) for token in range(tokens)), strict=True)
        return Tokens(np.stack(key), np.stack(value), np.array(scores), np.array(positions))


def attend(query, keys, values):
    """One group's output ``[group, head_dim]`` and probabilities ``[group, kvs]``, in float64."""
    p = _softmax(query.astype(np.float64) @ keys.astype(np.float64).T * query.shape[-1] ** -0.5)
    return p @ values.astype(np.float64), p
