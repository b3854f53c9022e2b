"""What rows hold of a cache's blocks and may still take, on the host: pairs of unquantised and quantised blocks."""

from __future__ import annotations

import jax
import numpy as np

from jaxkv.cache.state import CacheConfig, PagedCache
from jaxkv.policies import Policy, TierPolicy

RAW, QUANTISED = 0, 1


class Room:
    """What was true of a cache when it was last looked at. All counts are ``i64[2]``."""

    def __init__(self, config: CacheConfig, cache: PagedCache):
        self.config = config
        self.total = np.array([config.num_blocks - 1, config.tiers.num_blocks - 1 if config.tiers is not None else 0])
        self.free = self.total
        self.lengths = np.zeros(cache.lengths.shape, np.int32)
        self.quantised = np.zeros((*cache.lengths.shape, 2), np.int32)
        self.tokens = np.ones(2, np.int32) if cache.tiers is None else cache.tiers.tokens

    def look(self, cache: PagedCache) -> None:
        """Reads back what the heads hold and what is free."""
        tiers = () if cache.tiers is None else (cache.tiers.lengths, cache.tiers.free.count)
        self.lengths, free, *quantised = jax.device_get((cache.lengths, cache.num_free, *tiers))
        if quantised:
            self.quantised = quantised[0]
        self.free = np.array([int(free), int(quantised[1]) if quantised else 0])

    def held(self, row: int) -> np.ndarray:
        """Blocks of a row, those of a prefix included."""
        raw = -(-self.lengths[:, row] // self.config.block_size)
        return np.array([raw.sum(), (-(-self.quantised[:, row] // self.tokens)).sum()])

    def growth(self, row: int, policy: Policy | None, tokens: int) -> np.ndarray:
        """Blocks that a row allocates at most for so many more tokens."""
        if isinstance(policy, TierPolicy) and policy.quantises_decoding:
            before, size, pool = self.quantised[:, row], self.tokens, QUANTISED
        else:
            before, size, pool = self.lengths[:, row], self.config.block_size, RAW
        more = np.zeros(2, np.int64)
        more[pool] = (-(-(before + tokens) // size) + (-before // size)).sum()
        return more

    def unquantised(self, policy: TierPolicy) -> int:
        """Blocks of a row that may stay unquantised when it is compressed."""
        tokens = policy.protected_window + policy.sinks if policy.unquantised_window else 0
        return self.config.heads * -(-tokens // self.config.block_size)

    def compressed(self, policy: Policy | None, tokens: int) -> np.ndarray:
        """Blocks that a prompt of so many tokens may take when it is compressed, or all that there are."""
        if self.config.tiers is None or policy is None:
            return np.zeros(2, np.int64)
        worst = self.config.heads * (-(-tokens // self.config.tiers.layout.tokens) + 1)
        return np.array([0, min(worst, self.total[QUANTISED])])
