"""What a cache holds, read back to the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkv.cache.nbytes import nbytes
from jaxkv.cache.quantised import NoStore, QuantisedStore
from jaxkv.cache.shards import HeadShards
from jaxkv.cache.state import PagedCache


@dataclass(frozen=True, kw_only=True, repr=False)
class CacheStats:
    """What a cache holds. All bytes are of memory that is really held; what a prefix lends counts for each borrower."""

    bytes_allocated: int
    """All arrays of the cache: pools, scores, positions, tables, lengths, free lists."""
    bytes_held: int
    """Blocks held, quantised or not, with their scores and positions, and the tables."""
    bytes_full: int
    """The same if nothing had been evicted or quantised."""
    bytes_full_16bit: int
    """K and V alone of everything, at 16 bits a value, whatever the cache's dtype."""
    kvs_held: int
    kvs_high: int
    """Those of ``kvs_held`` that are quantised, in the high tier."""
    kvs_low: int
    kvs_full: int
    blocks_held: int
    """Quantised or not."""
    blocks_full: int
    blocks_free: int
    """Unquantised ones, of all devices."""
    block_size: int
    blocks_per_head: np.ndarray
    """``i32[layers, kv_heads]``, summed over the batch."""
    fragmentation: float
    """Share of the held slots that no KV fills."""
    nominal_share: float
    """Bits of K and V held over those of the full cache at 16 bits, as papers count: no scales, scores or slack."""

    def __repr__(self) -> str:
        """A few lines: bytes, KVs and blocks; the map of heads by its extremes."""
        layers, heads = self.blocks_per_head.shape
        least, most = (int(f()) for f in (self.blocks_per_head.min, self.blocks_per_head.max))
        return (
            f"CacheStats({self.bytes_held / 1e6:.1f} of {self.bytes_full / 1e6:.1f} MB held, "
            f"{self.bytes_allocated / 1e6:.1f} allocated;\n"
            f"  {self.kvs_held} of {self.kvs_full} KVs, {self.kvs_high} and {self.kvs_low} of them quantised;\n"
            f"  {self.blocks_held} of {self.blocks_full} blocks of {self.block_size}, {least} to {most} in each of "
            f"{layers} x {heads} heads)"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much each head of a cache holds: all that differs between two of the same shapes."""

    raw: Any
    """``i32[layers, batch, kv_heads]``: unquantised KVs."""
    quantised: Any
    """``i32[layers, batch, kv_heads, 2]``: KVs of each precision; None: there are no quantised blocks."""
    tokens: Any
    """``i32[batch]``: of the text."""
    free: Any
    """``i32[]``: unquantised blocks; ``i32[devices]`` of each device where heads are split over several."""
    quantised_free: Any
    """Likewise; None: there are none."""

    @classmethod
    def of(cls, cache: PagedCache) -> Counts:
        """On the device; ``jax.device_get`` reads them back at once."""
        raw, store = cache.raw, cache.quantised
        tables = None if isinstance(store, NoStore) else store.tables
        return cls(
            raw=raw.lengths,
            quantised=None if tables is None else tables.lengths,
            tokens=cache.num_tokens,
            free=raw.tables.free.count,
            quantised_free=None if tables is None else tables.free.count,
        )

    def gathered(self, shards: HeadShards) -> Counts:
        """All heads' and all devices', inside a ``jax.shard_map`` of these shards."""
        quantised, quantised_free = self.quantised, self.quantised_free
        return replace(
            self,
            raw=shards.gather(self.raw, 2),
            quantised=None if quantised is None else shards.gather(quantised, 2),
            free=shards.gather(self.free, 0),
            quantised_free=None if quantised_free is None else shards.gather(quantised_free, 0),
        )

    def row(self, row: int) -> Counts:
        """Those of one row of the batch."""
        one = slice(row, row + 1)
        quantised = None if self.quantised is None else self.quantised[:, one]
        return replace(self, raw=self.raw[:, one], quantised=quantised, tokens=self.tokens[one])


def stats(cache: PagedCache) -> CacheStats:
    """Reads the cache's sizes back to the host."""
    return stats_of(cache, jax.device_get(Counts.of(cache)))


def stats_of(cache: PagedCache, counts: Counts) -> CacheStats:
    """From what was read back; of the cache only the shapes matter."""
    raw, lengths, tokens = cache.raw, counts.raw, counts.tokens
    layers, batch, kv_heads = lengths.shape
    size = raw.block_size
    blocks = -(-lengths // size)
    kvs_full = int(tokens.sum()) * layers * kv_heads
    blocks_full = int((-(-tokens // size)).sum()) * layers * kv_heads
    row_bytes = batch * raw.tables.row_bytes + nbytes(cache.num_tokens)
    tiers = _of_tiers(cache.quantised, counts.quantised)
    kvs, slots = int(lengths.sum()) + sum(tiers.kvs), int(blocks.sum()) * size + tiers.slots
    bits = 32 * int(lengths.sum()) + tiers.bits
    per_head = (blocks + tiers.blocks).sum(1)
    return CacheStats(
        bytes_allocated=nbytes(cache),
        bytes_held=int(blocks.sum()) * raw.block_bytes + row_bytes + tiers.nbytes,
        bytes_full=blocks_full * raw.block_bytes + row_bytes,
        bytes_full_16bit=2 * kvs_full * 2 * raw.head_dim,
        kvs_held=kvs,
        kvs_high=tiers.kvs[0],
        kvs_low=tiers.kvs[1],
        kvs_full=kvs_full,
        blocks_held=int(per_head.sum()),
        blocks_full=blocks_full,
        blocks_free=int(np.sum(counts.free)),
        block_size=size,
        blocks_per_head=per_head,
        fragmentation=1 - kvs / slots if slots else 0.0,
        nominal_share=bits / (32 * kvs_full) if kvs_full else 0.0,
    )


class _Tiers(NamedTuple):
    """What the quantised store holds."""

    kvs: tuple[int, int] = (0, 0)
    blocks: np.ndarray | int = 0
    """``i32[layers, batch, kv_heads]``."""
    slots: int = 0
    bits: int = 0
    """Of K and V values."""
    nbytes: int = 0
    """Of blocks and tables."""


def _of_tiers(store: QuantisedStore | NoStore, lengths: np.ndarray) -> _Tiers:
    if isinstance(store, NoStore):
        return _Tiers()
    layout, blocks = store.layout, np.asarray(store.tables.num_blocks(lengths))  # pyright: ignore[reportArgumentType]
    high, low = (int(n) for n in lengths.sum((0, 1, 2)))
    return _Tiers(
        kvs=(high, low),
        blocks=blocks.sum(-1),
        slots=int((blocks * np.array(store.tables.kvs_a_block)).sum()),
        bits=high * layout.high.bits + low * layout.low.bits,
        nbytes=int(blocks.sum()) * layout.block_bytes + lengths.shape[1] * store.row_bytes,
    )
