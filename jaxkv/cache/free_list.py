"""A stack of free blocks, popped and pushed for all heads at once by ranks: no serial loop, no host."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from jaxkv.cache.shards import WHOLE, HeadShards, by_head


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FreeList:
    """The blocks of a pool that nobody holds; never block 0, the null block."""

    blocks: Array = field(metadata=by_head(0))
    """``i32[blocks]``, of which the first ``count`` are free."""
    count: Array = field(metadata=by_head(0))
    """``i32[]``; where heads are split over devices, each has its own, ``i32[1]``."""

    @classmethod
    def of(cls, num_blocks: int, shards: HeadShards = WHOLE) -> FreeList:
        """All of a pool, or of each device's, but the null block. The lowest go first; the last entry is spare."""
        blocks = (num_blocks - 1 - jnp.arange(num_blocks, dtype=jnp.int32)).astype(jnp.int32)
        return cls(blocks=jnp.tile(blocks, shards.count), count=shards.of_each(num_blocks - 1))

    def pop(self, need: Array, most: int) -> tuple[FreeList, Array, Array]:
        """Takes ``need`` blocks, ``i32[...]``, for each of many; their sum must be free.

        Returns:
          The rest; the blocks, ``i32[..., most]``; and which of these are real, ``bool``. ``most`` is static.
        """
        first = (jnp.cumsum(need, dtype=jnp.int32) - need.reshape(-1)).reshape(need.shape)
        place = jnp.arange(most, dtype=jnp.int32)
        real = place < need[..., None]
        rank = first[..., None] + place
        blocks = self.blocks[jnp.where(real, self.count - 1 - rank, 0)]
        return FreeList(blocks=self.blocks, count=self.count - jnp.sum(need, dtype=jnp.int32)), blocks, real

    def push(self, blocks: Array, freed: Array) -> FreeList:
        """Takes back the ``blocks``, ``i32[...]``, where ``freed``."""
        freed = freed.reshape(-1)
        rank = jnp.cumsum(freed, dtype=jnp.int32)
        at = jnp.where(freed, self.count + rank - 1, self.blocks.shape[0])
        return FreeList(
            blocks=self.blocks.at[at].set(blocks.reshape(-1), mode="drop"),
            count=self.count + rank[-1],
        )
