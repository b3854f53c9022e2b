"""What lies where in a block of quantised KVs.

A block is ``u32[rows, 128]`` whatever its tier, so one free list serves both; a tier says how many tokens fit. Read as
one line of words, a block of ``T`` tokens holds in this order::

    K codes   [n, sides, head_dim]     V codes   [n', sides, head_dim]
    K meta    [key_groups, T]          V meta    [value_groups, T]
    scores    [T] (f32)                positions [T] (i32)

A row of 128 words has room for two vectors of 64 (two ``sides``: the block's first ``T / 2`` tokens and its last), or
for one longer one. Codes are packed along the tokens, those of a pair 16 bits apart: of a side's ``n`` rows of words
row ``r`` has its tokens ``2 * r`` and ``2 * r + 1`` in the lowest bits of either half, above them those ``2 * n``
further, and so on. So a shift and a mask give whole rows of codes, two tokens to a word as 16-bit values lie in a TPU's
registers and in the tensor cores' operands, in order, and no value moves between lanes. A word of meta is a group's
scale (low half) and minimum (high half), IEEE half precision each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

LANES = 128
WIDTHS = (8, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class Format:
    """Bits of a K and of a V value, and into how many groups along the head dimension each vector is cut."""

    key_bits: int
    value_bits: int
    key_groups: int = 1
    value_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            if type(getattr(self, name)) is not int or getattr(self, name) not in WIDTHS:
                raise ValueError(f"{name} must be one of {WIDTHS}, got {getattr(self, name)!r:.60}")
        for name in ("key_groups", "value_groups"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {getattr(self, name)!r:.60}")

    @classmethod
    def named(cls, name: str) -> Format:
        """``"K8V4"``, or with groups ``"K8V4/1,2"``.

        Raises:
          ValueError: another form, or bits that aren't 8, 4, 2 or 1.
        """
        bits, _, groups = name.upper().partition("/")
        try:
            key, value = bits.removeprefix("K").split("V")
            key_groups, value_groups = (int(n) for n in groups.split(",")) if groups else (1, 1)
            return cls(key_bits=int(key), value_bits=int(value), key_groups=key_groups, value_groups=value_groups)
        except ValueError as error:
            raise ValueError(
                f"a format is like K8V4 or K4V2/2,4, of {WIDTHS} bits, got {name[:60]!r}: {error!s:.80}"
            ) from None

    def __str__(self) -> str:
        groups = f"/{self.key_groups},{self.value_groups}" if (self.key_groups, self.value_groups) != (1, 1) else ""
        return f"K{self.key_bits}V{self.value_bits}{groups}"

    @property
    def bits(self) -> int:
        """Of a K and a V value together: a nominal ratio is 32 over this."""
        return self.key_bits + self.value_bits


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Where a tier's parts begin, in words, and how many tokens fit in a block."""

    format: Format
    tokens: int
    sides: int
    """Vectors that share a row of words."""
    value: int
    key_meta: int
    value_meta: int
    scores: int
    positions: int
    end: int


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """The two formats of a block, and its size: what ``tokens`` of the high tier take, in whole rows or tiles of rows.

    Raises:
      ValueError: a head dimension that isn't whole, or that the groups don't divide; tokens that don't fill whole
        words; a low tier that takes more room than the high one.
    """

    head_dim: int
    high: Format
    low: Format
    tokens: int = 64
    """Tokens of a high block."""
    tile: int = 1
    """A block's rows are a multiple of this. A TPU keeps arrays in tiles of 8 rows, part-filled ones too."""
    low_step: int = 1
    """Where a high block's tokens are a multiple of this a low block's are too, and a block is up to a quarter larger
    for it: what kernels work on at once is then whole."""
    hadamard: bool = False
    """Whether K and V are turned before they are cached (``hadamard``), unquantised ones of the same cache, too."""

    def __post_init__(self) -> None:
        if self.head_dim % 16:
            raise ValueError(f"quantised tiers need a head dimension that is a multiple of 16, got {self.head_dim}")
        for tier in (self.high, self.low):
            for groups in (tier.key_groups, tier.value_groups):
                if self.head_dim % groups:
                    raise ValueError(f"groups must divide the head dimension: {tier} with {self.head_dim=}")
        step = self._step(self.high)
        if self.tokens < step or self.tokens % step:
            raise ValueError(f"a block of {self.high} holds a multiple of {step} tokens, got {self.tokens}")
        if self.low.bits > self.high.bits:
            raise ValueError(f"the low tier takes more bits than the high one: {self.low} below {self.high}")
        low = self.tiers[1].tokens
        if low < self.tokens:  # a table row has room for every KV in the high tier
            raise ValueError(
                f"the low tier's groups take what its codes save: a block holds {self.tokens} tokens at {self.high}, "
                f"but {low} at {self.low}; cut the low tier into fewer groups"
            )

    @cached_property
    def rows(self) -> int:
        """Rows of 128 words in a block."""
        least = self._rows(self.high, self.tokens)
        if self.tokens % self.low_step:
            return least
        larger = self._rows(self.low, -(-self._fitting(least, 1) // self.low_step) * self.low_step)
        return max(least, larger) if 4 * larger <= 5 * least else least

    @property
    def sides(self) -> int:
        """Vectors that share a row of words."""
        return 2 if 2 * self.head_dim == LANES else 1

    @property
    def words(self) -> int:
        return self.rows * LANES

    @property
    def block_bytes(self) -> int:
        return 4 * self.words

    @cached_property
    def tiers(self) -> tuple[Segments, Segments]:
        """High and low."""
        step = 1 if self.tokens % self.low_step else self.low_step
        return self._segments(self.high, self.tokens), self._segments(self.low, self._fitting(self.rows, step))

    def _rows(self, tier: Format, tokens: int) -> int:
        """That so many tokens take."""
        return -(-_words(tier, self.head_dim, tokens) // (LANES * self.tile)) * self.tile

    def _fitting(self, rows: int, step: int) -> int:
        """Tokens of the low tier in so many rows, a multiple of a step."""
        step = math.lcm(step, self._step(self.low))
        return rows * LANES // _words(self.low, self.head_dim, step) * step

    def _step(self, tier: Format) -> int:
        """Tokens that fill whole words of K and of V codes on each side."""
        return 32 // min(tier.key_bits, tier.value_bits) * self.sides

    def _segments(self, tier: Format, tokens: int) -> Segments:
        value = tokens * tier.key_bits // 32 * self.head_dim
        key_meta = value + tokens * tier.value_bits // 32 * self.head_dim
        value_meta = key_meta + tier.key_groups * tokens
        scores = value_meta + tier.value_groups * tokens
        return Segments(
            format=tier,
            tokens=tokens,
            sides=self.sides,
            value=value,
            key_meta=key_meta,
            value_meta=value_meta,
            scores=scores,
            positions=scores + tokens,
            end=scores + 2 * tokens,
        )


def _words(tier: Format, head_dim: int, tokens: int) -> int:
    """Words that so many tokens take."""
    return tokens * tier.bits * head_dim // 32 + tokens * (tier.key_groups + tier.value_groups + 2)
