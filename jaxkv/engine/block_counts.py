"""What rows hold of a cache's blocks and may still take, on the host: pairs of unquantised and quantised blocks."""

from __future__ import annotations

import jax
import numpy as np

from jaxkv.cache.config import CacheConfig
from jaxkv.cache.state import PagedCache
from jaxkv.policies import Policy

RAW, QUANTISED = 0, 1


class Room:
    """What was true of a cache when it was last looked at. All counts are ``i64[2]``."""

    def __init__(self, config: CacheConfig, cache: PagedCache):
        self.config = config
        self.total = np.array([config.num_blocks - 1, config.tiers.num_blocks - 1 if config.tiers is not None else 0])
        self.free = self.total
        self.lengths = np.zeros(cache.raw.lengths.shape, np.int32)
        self.quantised = np.zeros((*cache.raw.lengths.shape, 2), np.int32)
        self.tokens = np.ones(2, np.int32) if cache.layout is None else np.array(cache.tiers.tables.kvs_a_block)

    def look(self, cache: PagedCache) -> None:
        """Reads back what the heads hold and what is free."""
        tiers = () if cache.layout is None else (cache.tiers.tables.lengths, cache.tiers.tables.free.count)
        self.lengths, free, *quantised = jax.device_get((cache.raw.lengths, cache.raw.tables.free.count, *tiers))
        if quantised:
            self.quantised = quantised[0]
        self.free = np.array([int(free), int(quantised[1]) if quantised else 0])

    def held(self, row: int) -> np.ndarray:
        """Blocks of a row, those of a prefix included."""
        raw = -(-self.lengths[:, row] // self.config.block_size)
        return np.array([raw.sum(), (-(-self.quantised[:, row] // self.tokens)).sum()])

    def growth(self, row: int, policy: Policy | None, tokens: int) -> np.ndarray:
        """Blocks that a row allocates at most for so many more tokens."""
        if policy is not None and policy.placement.quantises_decoding:
            before, size, pool = self.quantised[:, row], self.tokens, QUANTISED
        else:
            before, size, pool = self.lengths[:, row], self.config.block_size, RAW
        more = np.zeros(2, np.int64)
        more[pool] = (-(-(before + tokens) // size) + (-before // size)).sum()
        return more

    def unquantised(self, policy: Policy) -> int:
        """Blocks of a row that may stay unquantised when it is compressed."""
        tokens = policy.placement.raw_tokens(policy.protected_window, policy.sinks)
        if tokens is None:
            return int(self.total[RAW])
        return self.config.heads * -(-tokens // self.config.block_size)

    def compressed(self, policy: Policy | None, tokens: int) -> np.ndarray:
        """Blocks that a prompt of so many tokens may take when it is compressed, or all that there are."""
        if self.config.tiers is None or policy is None:
            return np.zeros(2, np.int64)
        worst = self.config.heads * (-(-tokens // self.config.tiers.layout.tokens) + 1)
        return np.array([0, min(worst, self.total[QUANTISED])])
