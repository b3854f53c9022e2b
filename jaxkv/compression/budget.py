"""How much of a sequence's cache stays, in the form that its user thinks in: tokens, a ratio, a fraction or bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from jaxkv.cache.state import CacheConfig, num_blocks

if TYPE_CHECKING:
    from jaxkv.cache.state import PagedCache


MOST = 2**31 - 1
"""Blocks, or tokens: what an ``i32`` counts."""


class Budget(ABC):
    """Says how many blocks each sequence gives up. The budget is the sequence's: heads share it as they need."""

    @abstractmethod
    def evict_blocks(self, cache: PagedCache, protected_window: int) -> Array:
        """``i32[batch]``, never negative."""

    def most_bytes(self, tokens: Array, bytes_a_token: int) -> Array:
        """Bytes that a sequence of so many tokens may hold where a policy quantises, ``f32`` like tokens.

        ``bytes_a_token`` is what a token takes in the full cache at 16 bits a value, all heads together. Not asked
        where there are ``fixed_bytes``.
        """
        raise NotImplementedError(f"{type(self).__name__} doesn't bound bytes, which a policy that quantises needs")

    def fixed_bytes(self, bytes_a_token: int) -> int | None:
        """The same where it is one number for every text, exact at any size; None: it isn't."""
        return None

    def check(self, config: CacheConfig, protected_window: int) -> None:  # noqa: B027  # most can hold anything
        """Raises ValueError where the budget can't hold what is protected, or a block a head, unquantised."""


def _held(cache: PagedCache) -> Array:
    return cache.blocks_held().sum((0, 2))


def _heads(cache: PagedCache) -> int:
    return cache.lengths.shape[0] * cache.lengths.shape[2]


def _impossible(what: str, tokens: float, config: CacheConfig, window: int, instead: str) -> ValueError:
    return ValueError(
        f"{what} leaves {tokens:g} tokens a head, but a head keeps at least one block of {config.block_size} and the "
        f"protected window of {window}; {instead}, or a smaller protected_window"
    )


@dataclass(frozen=True, kw_only=True)
class Unlimited(Budget):
    """Nothing is evicted for want of room: a policy with thresholds decides alone."""

    def evict_blocks(self, cache: PagedCache, protected_window: int) -> Array:
        return jnp.zeros_like(cache.num_tokens)

    def most_bytes(self, tokens: Array, bytes_a_token: int) -> Array:
        return jnp.full(tokens.shape, jnp.inf)


@dataclass(frozen=True, kw_only=True)
class MaxTokens(Budget):
    """At most ``tokens`` KVs a head on average, in whole blocks (KV-Compress's ``max_cache_tokens``)."""

    tokens: int

    def __post_init__(self) -> None:
        if not self.tokens >= 1:
            raise ValueError(f"max_cache_tokens must be at least 1, got {self.tokens}")

    def evict_blocks(self, cache: PagedCache, protected_window: int) -> Array:
        keep = -(-self.tokens // cache.block_size) * _heads(cache)
        return jnp.maximum(_held(cache) - min(keep, MOST), 0)

    def __str__(self) -> str:
        return f"max_cache_tokens={self.tokens}"

    def fixed_bytes(self, bytes_a_token: int) -> int:
        return self.tokens * bytes_a_token

    def check(self, config: CacheConfig, protected_window: int) -> None:
        if self.tokens < max(config.block_size, protected_window):
            raise _impossible(str(self), self.tokens, config, protected_window, "give more tokens")


@dataclass(frozen=True, kw_only=True)
class Ratio(Budget):
    """The full cache's blocks divided by ``ratio``, rounded down, but never less than the protected window's blocks.

    The full cache is what the whole text so far would take, ``ceil(tokens / block_size)`` blocks a head.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 1 <= self.ratio <= 1e9:
            said = f"got {self.ratio}" if self.ratio <= 1e9 else "got more than 1e9"
            raise ValueError(f"ratio must be at least 1 (1 keeps everything, 8 keeps an eighth) and finite, {said}")
        object.__setattr__(self, "ratio", float(self.ratio))

    def evict_blocks(self, cache: PagedCache, protected_window: int) -> Array:
        full = num_blocks(cache.num_tokens, cache.block_size) * _heads(cache)
        keep = jnp.floor(full / self.ratio).astype(jnp.int32)
        keep = jnp.where(keep * self.ratio > full, keep - 1, keep)  # a float32 quotient may round up to a whole block
        least = max(1, -(-protected_window // cache.block_size)) * _heads(cache)
        return jnp.maximum(_held(cache) - jnp.maximum(keep, least), 0)

    def most_bytes(self, tokens: Array, bytes_a_token: int) -> Array:
        return tokens * (bytes_a_token / self.ratio)


@dataclass(frozen=True, kw_only=True)
class KeepFraction(Budget):
    """KV-Compress's own rate: ``fraction`` of the KVs before the protected window stays, and the window with them."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction kept must be in (0, 1], got {self.fraction}")

    def evict_blocks(self, cache: PagedCache, protected_window: int) -> Array:
        size, heads = cache.block_size, _heads(cache)
        protected = -(-protected_window // size) * size
        old = jnp.maximum(cache.num_tokens - protected, 0)
        target = jnp.ceil(old * heads * jnp.float32(self.fraction)).astype(jnp.int32) + protected * heads
        excess = jnp.maximum(cache.lengths.sum((0, 2)) - target, 0)
        return jnp.where(old > 0, -(-excess // size), 0)

    def most_bytes(self, tokens: Array, bytes_a_token: int) -> Array:
        return tokens * (bytes_a_token * self.fraction)


@dataclass(frozen=True, kw_only=True)
class MaxBytes(Budget):
    """At most ``size`` bytes a sequence, of blocks with their scores and positions.

    Tables come on top, but where a policy quantises: then they are inside.
    """

    size: int

    def __post_init__(self) -> None:
        if not self.size >= 1:
            raise ValueError(f"max_cache_bytes must be at least 1, got {self.size}")

    def evict_blocks(self, cache: PagedCache, protected_window: int) -> Array:
        return jnp.maximum(_held(cache) - min(self.size // cache.block_bytes, MOST), 0)

    def __str__(self) -> str:
        return f"max_cache_bytes={self.size}"

    def fixed_bytes(self, bytes_a_token: int) -> int:
        return self.size

    def check(self, config: CacheConfig, protected_window: int) -> None:
        tokens = self.size // config.block_bytes * config.block_size / config.heads
        if tokens < max(config.block_size, protected_window):
            raise _impossible(str(self), tokens, config, protected_window, "give more bytes")
