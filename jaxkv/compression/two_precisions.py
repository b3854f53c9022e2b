"""Any ranking, with two tiers: what ranks highest is kept at high precision, what comes next at low."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.cache.contents import Contents
from jaxkv.cache.home import GONE, HIGH, LOW, RAW
from jaxkv.cache.moves import Goal
from jaxkv.cache.shards import HeadShards
from jaxkv.cache.state import PagedCache
from jaxkv.compression.budget import in_blocks
from jaxkv.compression.placement import Worth
from jaxkv.compression.ranking import FIRST, KEPT, sort_keys, take_cheapest
from jaxkv.compression.tiered import Tiered


@dataclass(frozen=True, kw_only=True)
class TwoPrecisions(Tiered):
    """All heads of all layers compete for whole blocks of the budget, first for high ones and then for low ones.

    A block's price is the highest rank among the KVs that it would hold, as in KV-Compress (section 4), so what is
    allocated is also filled. Tokens decoded later are kept unquantised until they are compressed (``compress_every``);
    then they compete with all that is quantised, which keeps its scores. So a KV declines as better ones come:
    unquantised, high, low, gone.
    """

    high_share: float = 0.5
    """Part of the budget's blocks that are of the high tier; at least those of what is protected."""
    unquantised_window: bool = False
    """What is protected, sinks and the recent window, stays as it was computed, in unquantised blocks that the budget
    pays for; what has been quantised is not brought back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.high_share <= 1:
            raise ValueError(f"high_share is a part of the budget, from 0 to 1, got {self.high_share}")

    def protected_tokens(self, protected_window: int, sinks: int) -> int:
        return protected_window - 1 + sinks  # the newest token isn't cached yet

    def raw_tokens(self, protected_window: int, sinks: int) -> int:
        return self.protected_tokens(protected_window, sinks) if self.unquantised_window else 0

    def goal(self, cache: PagedCache, now: Contents, worth: Worth, room: Array) -> Goal:
        exists, protected = now.held, now.held & worth.protected
        stays = protected & (now.home == RAW) & self.unquantised_window
        exists &= ~stays
        protected &= ~stays
        rank = sort_keys(-worth.rank)  # the highest first
        keys = jnp.where(exists, jnp.where(protected, FIRST, rank), KEPT)
        rises = exists & (now.home != LOW)  # what is in the low tier already is not brought back

        high_tokens, low_tokens = (tier.tokens for tier in self.layout(cache.raw.head_dim).tiers)
        shards = cache.shards
        most = self.room_in_tables(cache, room - self._taken(cache, stays))
        needed = shards.sum(_blocks(protected & rises, high_tokens))
        high_blocks = jnp.clip(
            jnp.round(most.astype(jnp.float32) * self.high_share).astype(jnp.int32), needed, jnp.maximum(most, needed)
        )
        high = _best(jnp.where(rises, keys, KEPT), high_tokens, high_blocks, shards)
        left = jnp.maximum(most - shards.sum(_blocks(high, high_tokens)), 0)
        low = _best(jnp.where(high, KEPT, keys), low_tokens, left, shards)
        home = jnp.where(stays, RAW, jnp.where(high, HIGH, jnp.where(low, LOW, GONE)))
        return Goal(home=home, positions=now.positions, raw_stays=self.unquantised_window)

    def _taken(self, cache: PagedCache, stays: Array) -> Array | int:
        """Quantised blocks that the unquantised ones cost."""
        if not self.unquantised_window:
            return 0
        blocks = cache.shards.sum(_blocks(stays, cache.raw.block_size))
        size = self.block_bytes(cache)
        return in_blocks(blocks, cache.raw.block_bytes, size) + 1  # rounded up


def _blocks(kvs: Array, tokens: int) -> Array:
    """``i32[]``: blocks of so many tokens that the heads' KVs fill, ``bool[layers, 1, kv_heads, kvs]``."""
    return jnp.sum(-(-kvs.sum(-1, dtype=jnp.int32) // tokens), dtype=jnp.int32)


def _best(keys: Array, tokens: int, count: Array, shards: HeadShards) -> Array:
    """``bool`` like keys: the KVs that ``count`` blocks of a tier hold, the lowest keys of each head first.

    The heads get the blocks that are cheapest by their first key; a key of ``KEPT`` is no KV.
    """
    ascending = jnp.sort(keys, axis=-1)
    price = shards.gather(ascending[..., ::tokens], 2)
    blocks = take_cheapest(price.reshape(1, -1), count[None]).reshape(price.shape).sum(-1, dtype=jnp.int32)
    blocks = shards.own(blocks, 2)
    kvs = keys.shape[-1]
    taken = take_cheapest(keys.reshape(-1, kvs), tokens * blocks.reshape(-1), ascending.reshape(-1, kvs))
    return taken.reshape(keys.shape)
