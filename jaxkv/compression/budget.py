"""How much of a sequence's cache stays, in the form that its user thinks in: tokens, a ratio, a fraction or bytes.

A budget is of blocks, their scores and positions included, whatever is in them: a quantised block counts as its bytes.
Tables come on top, since compression frees none of them. It is the sequence's: heads share it as they need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxkv.cache.config import CacheConfig
from jaxkv.cache.state import PagedCache
from jaxkv.checks import check_numbers, shown

T = TypeVar("T", Array, int)
MOST = 2**31 - 1
"""Blocks, or tokens: what an ``i32`` counts."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a budget may ask of one sequence and its cache."""

    tokens: Array | int
    """``i32[]`` of the text whose budget applies: more than were read, where a prompt is read in parts."""
    kvs: Array | int
    """``i32[]``: unquantised KVs that it holds."""
    blocks: Array | int
    """``i32[]``: unquantised blocks that it holds."""
    heads: int = field(metadata={"static": True})
    """KV heads of all layers."""
    block_size: int = field(metadata={"static": True})
    block_bytes: int = field(metadata={"static": True})
    """Of an unquantised block."""
    protected_window: int = field(metadata={"static": True})

    @classmethod
    def of_sequence(cls, cache: PagedCache, tokens: Array, protected_window: int) -> Footprint:
        """Of the one sequence that the cache holds, by the budget of ``i32[]`` tokens."""
        raw = cache.raw
        layers, _, kv_heads = raw.lengths.shape
        return cls(
            tokens=tokens,
            kvs=cache.shards.sum(raw.lengths.sum(dtype=jnp.int32)),
            blocks=cache.shards.sum(raw.tables.blocks_held().sum(dtype=jnp.int32)),
            heads=layers * kv_heads * cache.shards.count,
            block_size=raw.block_size,
            block_bytes=raw.block_bytes,
            protected_window=protected_window,
        )

    @classmethod
    def of_prompt(cls, config: CacheConfig, tokens: int, protected_window: int) -> Footprint:
        """Of a prompt that is held in full."""
        return cls(
            tokens=tokens,
            kvs=tokens * config.all_heads,
            blocks=-(-tokens // config.block_size) * config.all_heads,
            heads=config.all_heads,
            block_size=config.block_size,
            block_bytes=config.block_bytes,
            protected_window=protected_window,
        )

    def full_blocks(self, tokens: T) -> T:
        """Unquantised blocks that so many tokens fill in all heads."""
        return -(-tokens // self.block_size) * self.heads

    @property
    def window_tokens(self) -> int:
        """The protected window in whole unquantised blocks."""
        return max(1, -(-self.protected_window // self.block_size)) * self.block_size

    @property
    def window_blocks(self) -> int:
        """Unquantised blocks that the protected window takes in all heads, at least one each."""
        return self.full_blocks(self.window_tokens)


class Budget(ABC):
    """Says how many blocks each sequence may hold."""

    @abstractmethod
    def unquantised_blocks(self, of: Footprint) -> Array | int:
        """``i32[]``: how many unquantised blocks may stay."""

    def blocks(self, of: Footprint, block_bytes: int) -> Array | int:
        """``i32[]``: how many blocks of so many bytes may stay: as many bytes as the unquantised ones have."""
        return in_blocks(self.unquantised_blocks(of), of.block_bytes, block_bytes)

    def fixed_bytes(self, config: CacheConfig) -> int | None:
        """Bytes of blocks that a sequence may hold, where it is one number for every text; None: it isn't."""
        return None

    def check(self, config: CacheConfig, protected_window: int) -> None:  # noqa: B027  # most can hold anything
        """Raises ValueError where the budget can't hold what is protected, or a block a head, unquantised."""


def in_blocks(count: Array | int, from_bytes: int, to_bytes: int) -> Array | int:
    """How many blocks of ``to_bytes`` fit in ``count`` of ``from_bytes``, exactly, without leaving ``i32``."""
    if from_bytes == to_bytes:
        return count
    whole, rest = divmod(from_bytes, to_bytes)
    if isinstance(count, int):
        return min(count * from_bytes // to_bytes, MOST)
    thousands, units = count // 1024, count % 1024
    per_thousand, over = divmod(1024 * rest, to_bytes)
    return count * whole + thousands * per_thousand + (thousands * over + units * rest) // to_bytes


@dataclass(frozen=True, kw_only=True)
class Unlimited(Budget):
    """Nothing goes for want of room: a policy with thresholds decides alone."""

    def unquantised_blocks(self, of: Footprint) -> int:
        return MOST


@dataclass(frozen=True)
class MaxTokens(Budget):
    """As many blocks as ``tokens`` unquantised KVs a head fill (KV-Compress's ``max_cache_tokens``)."""

    tokens: int

    def __post_init__(self) -> None:
        check_numbers(self, tokens="max_cache_tokens")
        if not self.tokens >= 1:
            raise ValueError(f"max_cache_tokens must be at least 1, got {shown(self.tokens)}")

    def unquantised_blocks(self, of: Footprint) -> int:
        return min(of.full_blocks(self.tokens), MOST)

    def __str__(self) -> str:
        return f"max_cache_tokens={self.tokens}"

    def fixed_bytes(self, config: CacheConfig) -> int:
        return -(-self.tokens // config.block_size) * config.all_heads * config.block_bytes

    def check(self, config: CacheConfig, protected_window: int) -> None:
        if self.tokens < max(config.block_size, protected_window):
            raise _impossible(str(self), self.tokens, config, protected_window, "give more tokens")


@dataclass(frozen=True)
class Ratio(Budget):
    """What the same cache would hold of the whole text uncompressed, in its own dtype, divided by ``ratio``.

    In whole blocks, rounded down, of ``ceil(tokens / block_size)`` blocks a head; but never less than those of the
    protected window.
    """

    ratio: float

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 1 <= self.ratio <= 1e9:
            said = f"got {self.ratio}" if self.ratio <= 1e9 else "got more than 1e9"
            if 0 < self.ratio < 1:  # what kvpress calls a compression ratio
                said += f"; a share of {self.ratio:g} removed is a ratio of {1 / (1 - self.ratio):g}"
            raise ValueError(f"ratio must be at least 1 (1 keeps everything, 8 keeps an eighth) and finite, {said}")
        object.__setattr__(self, "ratio", float(self.ratio))

    def unquantised_blocks(self, of: Footprint) -> Array:
        full = jnp.asarray(of.full_blocks(jnp.asarray(of.tokens)), jnp.float32)
        keep = jnp.floor(full / self.ratio)
        # A float32 quotient may round up to a whole block.
        keep = jnp.where(keep * self.ratio > full, keep - 1, keep).astype(jnp.int32)
        return jnp.maximum(keep, of.window_blocks)


@dataclass(frozen=True)
class KeepFraction(Budget):
    """KV-Compress's own rate: ``fraction`` of the KVs before the protected window stays, and the window with them."""

    fraction: float

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction kept must be in (0, 1], got {shown(self.fraction)}")

    def unquantised_blocks(self, of: Footprint) -> Array:
        """As many go as are filled by what is held beyond the KVs that stay; of a text within the window none."""
        excess = jnp.maximum(of.kvs - self._kvs(of), 0)
        return jnp.where(of.tokens > of.window_tokens, of.blocks - -(-excess // of.block_size), of.blocks)

    def blocks(self, of: Footprint, block_bytes: int) -> Array | int:
        return in_blocks(-(-self._kvs(of) // of.block_size), of.block_bytes, block_bytes)

    def _kvs(self, of: Footprint) -> Array:
        """KVs that stay, of all heads."""
        old = jnp.maximum(of.tokens - of.window_tokens, 0)
        return (
            jnp.ceil((old * of.heads).astype(jnp.float32) * self.fraction).astype(jnp.int32)
            + of.window_tokens * of.heads
        )


@dataclass(frozen=True)
class MaxBytes(Budget):
    """At most ``size`` bytes a sequence."""

    size: int

    def __post_init__(self) -> None:
        check_numbers(self, size="max_cache_bytes")
        if not self.size >= 1:
            raise ValueError(f"max_cache_bytes must be at least 1, got {shown(self.size)}")

    def unquantised_blocks(self, of: Footprint) -> int:
        return self.blocks(of, of.block_bytes)

    def blocks(self, of: Footprint, block_bytes: int) -> int:
        return min(self.size // block_bytes, MOST)

    def __str__(self) -> str:
        return f"max_cache_bytes={self.size}"

    def fixed_bytes(self, config: CacheConfig) -> int:
        return self.size

    def check(self, config: CacheConfig, protected_window: int) -> None:
        tokens = self.size // config.block_bytes * config.block_size / config.all_heads
        if tokens < max(config.block_size, protected_window):
            raise _impossible(str(self), tokens, config, protected_window, "give more bytes")


IN_WORDS: dict[str, Callable[[Any], Budget]] = {
    "ratio": Ratio,
    "max_cache_tokens": MaxTokens,
    "max_cache_bytes": MaxBytes,
}
"""Budgets that can be said as a number, by what it is called."""


def budget_in_words(said: Mapping[str, Any]) -> Budget | None:
    """The budget that one of ``IN_WORDS`` says; None: none does.

    Raises:
      ValueError: several do, or the number is out of range.
    """
    given = {name: said[name] for name in IN_WORDS if said.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(IN_WORDS)}, got {len(given)}")
    return next((IN_WORDS[name](value) for name, value in given.items()), None)


def _impossible(what: str, tokens: float, config: CacheConfig, window: int, instead: str) -> ValueError:
    return ValueError(
        f"{what} leaves {tokens:g} tokens a head, but a head keeps at least one block of {config.block_size} and the "
        f"protected window of {window}; {instead}, or a smaller protected_window"
    )
