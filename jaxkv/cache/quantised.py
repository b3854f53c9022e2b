"""The quantised store: blocks of two precisions from one free list, with scores and positions inside.

``NoStore`` stands for it in a cache without quantised blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.home import HIGH, LOW
from jaxkv.cache.nbytes import nbytes
from jaxkv.cache.shards import WHOLE, HeadShards, by_head
from jaxkv.cache.tables import HeadTables
from pallas_kernels.paged_attention import TieredKVs, Weakest
from pallas_kernels.quantised_block import BlockLayout, blocks
from pallas_kernels.walk import walk


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantisedStore:
    """Donated with the cache that it is a part of. Tiers are ``Home.HIGH`` and ``Home.LOW``."""

    pool: Array = field(metadata=by_head(0))
    """``u32[blocks, rows, 128]``: blocks of ``layout``."""
    tables: HeadTables
    weakest: Weakest = field(metadata=by_head(2))
    """``[layers, batch, kv_heads, 2]``: the KV that the next decode step would give up first."""
    layout: BlockLayout = field(metadata={"static": True})

    @classmethod
    def empty(
        cls,
        heads: tuple[int, int, int],
        *,
        layout: BlockLayout,
        num_blocks: int,
        max_blocks: int,
        shards: HeadShards = WHOLE,
    ) -> QuantisedStore:
        tokens = tuple(tier.tokens for tier in layout.tiers)
        return cls(
            pool=jnp.zeros((shards.count * num_blocks, layout.rows, 128), jnp.uint32),
            tables=HeadTables.empty(
                heads, max_blocks=max_blocks, num_blocks=num_blocks, kvs_a_block=tokens, shards=shards
            ),
            weakest=Weakest(value=jnp.full((*heads, 2), jnp.inf, jnp.float32), index=jnp.zeros((*heads, 2), jnp.int32)),
            layout=layout,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of a sequence's table rows, with what else there is of each head."""
        return self.tables.row_bytes + nbytes(self.weakest) // self.weakest.value.shape[1]

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes

    def num_kvs(self) -> Array:
        """``i32[layers, batch, kv_heads]``: KVs that a head holds here."""
        return self.tables.lengths.sum(-1, dtype=jnp.int32)

    def scores_and_positions(self, tier: int) -> tuple[Array, Array]:
        """Of all heads' KVs of a tier, ``[layers, batch, kv_heads, max_blocks * tokens]``, in the tier's order."""
        segments, table = self.layout.tiers[tier], self.tables.from_left(tier)
        words = blocks.read_words(self.pool, table, segments.scores, segments.end)
        scores, positions = (part.reshape(*table.shape[:3], -1) for part in jnp.split(words, 2, axis=-1))
        return lax.bitcast_convert_type(scores, jnp.float32), lax.bitcast_convert_type(positions, jnp.int32)

    def with_scores(self, scores: Array, positions: Array) -> QuantisedStore:
        """New scores and positions of all KVs, ``[layers, batch, kv_heads, kvs]``: first of the high tier's."""
        last = scores.shape[-1] - 1

        def put(pool: Array) -> Array:
            values = [lax.bitcast_convert_type(part, jnp.uint32) for part in (scores, positions)]
            for tier, segments in enumerate(self.layout.tiers):
                table = self.tables.from_left(tier)
                width = table.shape[-1]
                index = (
                    jnp.arange(width * segments.tokens, dtype=jnp.int32) + self.tables.lengths[..., HIGH, None] * tier
                )
                index = jnp.minimum(index, last)
                new = [jnp.take_along_axis(part, index, axis=-1).reshape(*table.shape, -1) for part in values]
                real = jnp.arange(width, dtype=jnp.int32) < self.tables.blocks_held()[..., tier, None]
                at = jnp.where(real, table, pool.shape[0])
                pool = blocks.write_words(pool, at, segments.scores, jnp.concatenate(new, axis=-1))
            return pool

        return replace(self, pool=lax.cond(self._holds_something(), put, lambda pool: pool, self.pool))

    def read_over(self, kv: tuple[Array, Array], layer: int | Array, home: Array, index: Array) -> tuple[Array, Array]:
        """K and V of a layer, ``f32[batch, kv_heads, kvs, head_dim]``, with those that live here dequantised over them.

        ``home`` and ``index``, ``i32[batch, kv_heads, kvs]``, tell which these are.
        """

        def read(kv: tuple[Array, Array]) -> tuple[Array, Array]:
            key, value = kv
            for tier, segments in enumerate(self.layout.tiers):
                words = blocks.read_words(self.pool, self.tables.from_left(tier)[layer], 0, segments.end)
                read = blocks.decode(words, segments, self.layout.head_dim)
                here = (home == tier)[..., None]
                key = jnp.where(here, _at(read.key, index), key)
                value = jnp.where(here, _at(read.value, index), value)
            return key, value

        return lax.cond(self._holds_something(), read, lambda kv: kv, kv)

    def fits(self, count: Array) -> Array:
        """``bool[]``: whether blocks suffice for ``i32[layers, 1, kv_heads, 2]`` KVs of one sequence, layer by layer:
        a layer's blocks are given back before it takes its new ones. On all devices, as ``move`` needs it."""
        more = self.tables.num_blocks(count) - self.tables.blocks_held()
        most = jnp.max(jnp.cumsum(more.sum((1, 2, 3), dtype=jnp.int32), dtype=jnp.int32))
        return self.tables.shards.everywhere(most <= self.tables.free.count)

    def refill_layer(
        self, layer: Array, kvs: blocks.Tokens, count: Array, first: Array, order: Array
    ) -> QuantisedStore:
        """A layer of one sequence with other KVs in place of what it held; enough blocks must be free.

        Args:
          layer: ``i32[]``.
          kvs: of the layer, ``[kv_heads, kvs, ...]``.
          count: ``i32[layers, 1, kv_heads, 2]``: how many go to each tier.
          first: likewise: where in ``order`` they begin.
          order: ``i32[layers, 1, kv_heads, kvs]``: which of ``kvs``.
        """
        this = (jnp.arange(count.shape[0], dtype=jnp.int32) == layer)[:, None, None, None]
        tables = self.tables.shrink(jnp.where(this, 0, self.tables.lengths))
        most = tables.max_blocks * min(tables.kvs_a_block)
        tables, _ = tables.grow(jnp.where(this, count, tables.lengths), most=most)
        pool = self.pool
        for tier in (HIGH, LOW):
            place = tables.from_left(tier)[layer, 0], count[layer, 0, :, tier], first[layer, 0, :, tier]
            pool = self._fill(pool, tier, *place, kvs, order[layer, 0])
        return replace(self, pool=pool, tables=tables)

    def _fill(
        self, pool: Array, tier: int, table: Array, lengths: Array, start: Array, kvs: blocks.Tokens, order: Array
    ) -> Array:
        """Writes a layer's KVs of a tier into its blocks, ``i32[kv_heads, max_blocks]`` from the left."""
        segments = self.layout.tiers[tier]
        blocks_of = walk(table, lengths, segments.tokens)

        def step(i: Array, pool: Array) -> Array:
            part = blocks_of.part(i)
            place = jnp.minimum(start[part.row][:, None] + part.places, order.shape[-1] - 1)
            kv = order[part.row[:, None], place]

            def take(values: Array) -> Array:
                taken = values[part.row[:, None], kv]
                return jnp.where(part.held.reshape(part.held.shape + (1,) * (taken.ndim - 2)), taken, 0)

            new = blocks.encode(blocks.Tokens(*(take(values) for values in kvs)), segments, self.layout.words)
            return pool.at[part.blocks].set(new.reshape(-1, *pool.shape[1:]), mode="promise_in_bounds")

        return lax.fori_loop(0, blocks_of.steps, step, pool)

    def copy_blocks(self, source: Array, target: Array) -> QuantisedStore:
        """Blocks ``source``, ``i32[...]``, also as ``target``; one past the pool for nowhere."""
        return replace(self, pool=self.pool.at[target].set(self.pool[source], mode="drop"))

    def reorder(self, rows: Array) -> QuantisedStore:
        """Each row holds what row ``rows``, ``i32[batch]``, did; blocks are shared."""
        weakest = jax.tree.map(lambda x: x[:, rows], self.weakest)
        return replace(self, tables=self.tables.reorder(rows), weakest=weakest)

    def view(self, layer: int | Array, rows: Array) -> TieredKVs:
        """What an attention kernel takes of a layer; nothing of sequences outside the rows, ``bool[batch]``."""
        lengths = jnp.where(rows[:, None, None], self.tables.lengths[layer], 0)
        return TieredKVs(
            pool=self.pool, block_table=self.tables.block_table[layer], lengths=lengths, layout=self.layout
        )

    def release(self, finished: Array) -> QuantisedStore:
        """Empties the rows of the batch where ``finished``, ``bool[batch]``."""
        finished = finished[None, :, None, None]
        return replace(
            self,
            tables=self.tables.shrink(jnp.where(finished, 0, self.tables.lengths)),
            weakest=replace(self.weakest, value=jnp.where(finished, jnp.inf, self.weakest.value)),
        )

    def rows(self, which: Array) -> QuantisedStore:
        """Only these rows of the batch, ``i32[n]``, over the same pool."""
        return replace(self, tables=self.tables.rows(which), weakest=jax.tree.map(lambda x: x[:, which], self.weakest))

    def with_rows(self, part: QuantisedStore, which: Array) -> QuantisedStore:
        """Rows ``which`` and the pool from ``part``, the other rows from these."""
        return replace(
            part,
            tables=self.tables.with_rows(part.tables, which),
            weakest=jax.tree.map(lambda x, new: x.at[:, which].set(new), self.weakest, part.weakest),
        )

    def _holds_something(self) -> Array:
        return jnp.any(self.tables.lengths > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoStore:
    """Of a cache without quantised blocks: it holds nothing, and each verb leaves what it is given."""

    layout = None
    row_bytes = 0

    def num_kvs(self) -> int:
        return 0

    def with_scores(self, scores: Array, positions: Array) -> NoStore:
        return self

    def read_over(self, kv: tuple[Array, Array], *_: Any) -> tuple[Array, Array]:
        return kv

    def view(self, layer: int | Array, rows: Array) -> None:
        return None

    def release(self, finished: Array) -> NoStore:
        return self

    def reorder(self, rows: Array) -> NoStore:
        return self

    def rows(self, which: Array) -> NoStore:
        return self

    def with_rows(self, part: NoStore, which: Array) -> NoStore:
        return self


def _at(vectors: Array, index: Array) -> Array:
    """Those at ``i32[..., kvs]`` of the vectors ``[..., blocks, tokens, head_dim]``, or any where there is none."""
    flat = vectors.reshape(*index.shape[:-1], -1, vectors.shape[-1])
    return jnp.take_along_axis(flat, jnp.minimum(index, flat.shape[-2] - 1)[..., None], axis=-2)
