"""What rows hold of a cache's blocks and may still take, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkv.cache import CacheConfig
from jaxkv.cache.stats import CacheStats, Counts, stats_of
from jaxkv.policies import Policy


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """So many of each pool, a number for all devices or ``i64[devices]``. ``a <= b``: where there are b, a can be had,
    on each device."""

    raw: Any = 0
    quantised: Any = 0

    def __add__(self, other: Blocks) -> Blocks:
        return Blocks(raw=self.raw + other.raw, quantised=self.quantised + other.quantised)

    def __sub__(self, other: Blocks) -> Blocks:
        return Blocks(raw=self.raw - other.raw, quantised=self.quantised - other.quantised)

    def or_more(self, other: Blocks) -> Blocks:
        """The larger number of each."""
        return Blocks(raw=_larger(self.raw, other.raw), quantised=_larger(self.quantised, other.quantised))

    @property
    def fullest(self) -> Blocks:
        """As numbers: of the device that has most of a pool."""
        return Blocks(raw=int(np.max(self.raw)), quantised=int(np.max(self.quantised)))

    def __le__(self, other: Blocks) -> bool:
        fits = (self.raw <= other.raw) & (self.quantised <= other.quantised)
        return fits if isinstance(fits, bool) else bool(fits.all())


class BlockCounts:
    """What was true of a cache of these sizes when it was last looked at; at first it is empty."""

    def __init__(self, config: CacheConfig):
        self.config, self.devices = config, config.shards.count
        self._one_row = jax.eval_shape(lambda cache: cache.rows(jnp.zeros(1, jnp.int32)), config.shapes)
        """The shapes of a cache of one row."""
        self.quantised_kvs = np.ones(2, np.int32)
        """``i32[2]``: KVs that a block of each precision holds."""
        self.total = Blocks(raw=config.num_blocks - 1)
        if config.tiers is not None:
            self.quantised_kvs = np.array([tier.tokens for tier in config.tiers.layout.tiers], np.int32)
            self.total += Blocks(quantised=config.tiers.num_blocks - 1)
        self.free = self.total
        heads = config.num_layers, config.batch, config.num_kv_heads
        each = 1 if self.devices == 1 else np.ones(self.devices, np.int64)
        self.seen = Counts(
            raw=np.zeros(heads, np.int32),
            quantised=None if config.tiers is None else np.zeros((*heads, 2), np.int32),
            tokens=np.zeros(config.batch, np.int32),
            free=self.total.raw * each,
            quantised_free=None if config.tiers is None else self.total.quantised * each,
        )
        """All that was read back."""

    @property
    def raw_lengths(self) -> np.ndarray:
        """``i32[layers, batch, kv_heads]``: unquantised KVs."""
        return self.seen.raw

    @property
    def quantised_lengths(self) -> np.ndarray:
        """``i32[layers, batch, kv_heads, 2]``: KVs of each precision, where there are quantised blocks."""
        return self.seen.quantised

    def look(self, counts: Counts, *also: Array) -> list[np.ndarray]:
        """Reads back what the heads hold and what is free, and other arrays with that."""
        seen, fetched = jax.device_get((counts, list(also)))
        self.take(seen)
        return fetched

    def take(self, seen: Counts) -> None:
        """What was read back in another way."""
        self.seen = seen
        quantised = 0 if seen.quantised_free is None else seen.quantised_free
        if self.devices == 1:
            self.free = Blocks(raw=int(np.sum(seen.free)), quantised=int(np.sum(quantised)))
        else:
            self.free = Blocks(raw=np.asarray(seen.free, np.int64), quantised=np.asarray(quantised, np.int64))

    def stats(self, row: int) -> CacheStats:
        """Of one row."""
        return stats_of(self._one_row, self.seen.row(row))

    def held(self, row: int) -> Blocks:
        """Blocks of a row, those of a prefix included."""
        raw = self._filled(self.raw_lengths[:, [row]], self.config.block_size)
        if self.config.tiers is None:
            return Blocks(raw=raw)
        return Blocks(raw=raw, quantised=self._filled(self.quantised_lengths[:, [row]], self.quantised_kvs))

    def growth(self, rows: Sequence[int], policies: Sequence[Policy | None], tokens: Sequence[int]) -> Blocks:
        """What rows allocate at most for so many more tokens each."""
        quantise = np.array([policy is not None and policy.placement.quantises_decoding for policy in policies], bool)
        where, more = np.array(rows, np.int32), np.array(tokens, np.int32)
        lengths, size = self.raw_lengths[:, where[~quantise]], self.config.block_size
        raw = self._filled(lengths + more[~quantise][:, None], size) - self._filled(lengths, size)
        if not quantise.any():
            return Blocks(raw=raw)
        lengths, more = self.quantised_lengths[:, where[quantise]], more[quantise][:, None]
        return Blocks(raw=raw, quantised=self._of_device(_most_new(lengths, self.quantised_kvs, more)))

    def left_unquantised(self, row: int, policy: Policy | None) -> bool:
        """Whether a row that is compressed holds what ought to be quantised: there were too few blocks for it."""
        if policy is None:
            return False
        tokens = policy.placement.raw_tokens(policy.protected_window, policy.sinks)
        return tokens is not None and self.held(row).fullest.raw > self.config.full_blocks(tokens)

    def _filled(self, lengths: np.ndarray, size: int | np.ndarray) -> Any:
        """Blocks of so many KVs that heads fill, ``i32[layers, rows, kv_heads, ...]``, the last of each in part."""
        return self._of_device(-(-lengths // size))

    def _of_device(self, blocks: np.ndarray) -> Any:
        """The sum of ``i32[layers, rows, kv_heads, ...]`` over each device's heads."""
        if self.devices == 1:
            return int(blocks.sum())
        return blocks.sum((0, 1), dtype=np.int64).reshape(self.devices, -1).sum(1)


def _larger(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else np.maximum(a, b)


def _most_new(lengths: np.ndarray, sizes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Blocks that so many more KVs a head, ``i32[batch, 1]``, open at most, whichever of the two tiers each goes to.

    Once a block of either tier is begun, another costs as many KVs as fill one of the tier of smaller blocks: so the
    worst is that tier alone, or one block of the other first.
    """

    def opened(tier: int, kvs: np.ndarray) -> np.ndarray:
        held, size = lengths[..., tier], sizes[tier]
        return -(-(held + kvs) // size) - -(-held // size)

    def one_first(tier: int) -> np.ndarray:
        left = tokens - (-lengths[..., tier] % sizes[tier]) - 1  # what the tier's last block still takes, and one more
        return np.where(left >= 0, 1 + opened(1 - tier, np.maximum(left, 0)), 0)

    return np.max([opened(0, tokens), opened(1, tokens), one_first(0), one_first(1)], axis=0)
