"""A stack of free blocks, popped and pushed for all heads at once by ranks: no serial loop, no host.

A block may have several holders: heads of rows that were forked, and prefixes. It is free once the last of them has
given it back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
    others: Array = field(metadata=by_head(0))
    """``i32[blocks]``: how many hold each block beside one; 0 of those that are free."""

    @classmethod
    def of(cls, num_blocks: int, shards: HeadShards = WHOLE) -> FreeList:
        """All of a pool, or of each device's, but the null block. The lowest go first; the last entry is spare."""
        blocks = (num_blocks - 1 - jnp.arange(num_blocks, dtype=jnp.int32)).astype(jnp.int32)
        return cls(
            blocks=jnp.tile(blocks, shards.count),
            count=shards.of_each(num_blocks - 1),
            others=jnp.zeros(num_blocks * shards.count, jnp.int32),
        )

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
        return replace(self, count=self.count - jnp.sum(need, dtype=jnp.int32)), blocks, real

    def push(self, blocks: Array, given: Array) -> FreeList:
        """Takes back the ``blocks``, ``i32[...]``, where ``given``; of one that others hold, too, one holder goes.

        No block may be given by its last holder and by another at once.
        """
        blocks, given = blocks.reshape(-1), given.reshape(-1)
        last = given & (self.others[blocks] == 0)
        rank = jnp.cumsum(last, dtype=jnp.int32)
        at = jnp.where(last, self.count + rank - 1, self.blocks.shape[0])
        return FreeList(
            blocks=self.blocks.at[at].set(blocks, mode="drop"),
            count=self.count + rank[-1],
            others=self._held(blocks, given & ~last, -1),
        )

    def share(self, blocks: Array, held: Array) -> FreeList:
        """One more holds the ``blocks``, ``i32[...]``, where ``held``."""
        return replace(self, others=self._held(blocks, held, 1))

    def any_shared(self) -> Array:
        """``bool[]``."""
        return jnp.any(self.others > 0)

    def _held(self, blocks: Array, where: Array, more: int) -> Array:
        at = jnp.where(where, blocks, self.others.shape[0])
        return self.others.at[at.reshape(-1)].add(more, mode="drop")
