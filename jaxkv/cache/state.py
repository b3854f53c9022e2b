"""The cache: what is held unquantised, what is held quantised, and how far each text has come."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from jaxkv.cache.quantised import NoStore, QuantisedStore
from jaxkv.cache.raw import RawStore
from jaxkv.cache.shards import HeadShards
from pallas_kernels.quantised_block import BlockLayout
from pallas_kernels.settings import any_ranks


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedCache:
    """Donated at every jit boundary: after the call the old one is gone.

    The order of a head's KVs is that of its table rows, the quantised ones first, not that of the text: after the first
    eviction ``positions`` alone tells where a KV stood.
    """

    raw: RawStore
    """Prompts are read into it, and most policies keep all of theirs there."""
    quantised: QuantisedStore | NoStore
    num_tokens: Array
    """``i32[batch]``: tokens of the text that the cache has seen, and so the next one's position."""

    @property
    def layout(self) -> BlockLayout | None:
        """That of quantised blocks; None: there are none."""
        return self.quantised.layout

    @property
    def tiers(self) -> QuantisedStore:
        """The quantised store.

        Raises:
          ValueError: there is none.
        """
        if isinstance(self.quantised, NoStore):
            raise ValueError("this cache has no quantised blocks; give its CacheConfig the layout of the policy's")
        return self.quantised

    @property
    def shards(self) -> HeadShards:
        """How the KV heads are split over devices."""
        return self.raw.tables.shards

    @property
    def capacity(self) -> int:
        """KVs that a head can hold in all."""
        return self.raw.capacity

    @property
    def lengths(self) -> Array:
        """``i32[layers, batch, kv_heads]``: KVs that a head holds, quantised or not."""
        return self.raw.lengths + self.quantised.num_kvs()

    def within_capacity(self, lengths: Array, rows: Array) -> Array:
        """``bool[]``: whether so many KVs a head can be told apart in the rows, ``bool[batch]``.

        Blocks alone would allow more: of the low tier, and quantised beside unquantised.
        """
        return self.shards.everywhere(jnp.all((lengths <= self.capacity) | ~rows[None, :, None]))

    def rows(self, which: Array) -> PagedCache:
        """A cache of only these rows of the batch, ``i32[n]``, over the same pools; see ``with_rows``."""
        return PagedCache(
            raw=self.raw.rows(which),
            quantised=self.quantised.rows(which),
            num_tokens=self.num_tokens[which],
        )

    def with_rows(self, part: PagedCache, which: Array) -> PagedCache:
        """The whole cache again: rows ``which`` and the pools from ``part``, the other rows from this one."""
        return PagedCache(
            raw=self.raw.with_rows(part.raw, which),
            quantised=self.quantised.with_rows(part.quantised, which),  # pyright: ignore[reportArgumentType]
            num_tokens=self.num_tokens.at[which].set(part.num_tokens),
        )

    def with_raw_lengths(self, lengths: Array) -> PagedCache:
        """Cuts each head to ``i32[layers, batch, kv_heads]`` unquantised KVs; the blocks past them are free again, but
        for those that others hold, too."""
        return replace(self, raw=replace(self.raw, tables=self.raw.tables.shrink(lengths[..., None])))


@any_ranks
def release(cache: PagedCache, finished: Array) -> PagedCache:
    """Empties the rows of the batch where ``finished``, ``bool[batch]``, and takes their blocks back."""
    cache = cache.with_raw_lengths(jnp.where(finished[:, None], 0, cache.raw.lengths))
    return replace(
        cache,
        quantised=cache.quantised.release(finished),
        num_tokens=jnp.where(finished, 0, cache.num_tokens),
    )
