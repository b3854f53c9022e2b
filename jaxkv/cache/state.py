"""The per-head paged cache: one pool of blocks, and for every KV head of every layer a block table of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkv.cache.quantised import TierConfig, Tiers, init_tiers
from pallas_kernels import padded_head_dim, slot_values
from pallas_kernels.pool_values import pool_dtype
from pallas_kernels.quantised_block import BlockLayout

if TYPE_CHECKING:
    from models import LlamaConfig

LANES = 128
"""Scores and positions lie in rows of 128: a narrower minor dimension is laid out anew on every TPU call."""
NULL_BLOCK = 0
"""Masked reads and writes go there; it is never handed out."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Sizes of a cache. ``num_blocks`` counts the null block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    batch: int
    max_context: int
    """KVs that a head can hold, which bounds the prompt before it is compressed."""
    num_blocks: int
    block_size: int = 16
    dtype: jnp.dtype = jnp.float32  # pyright: ignore[reportAssignmentType]
    padded_head_dim: int | None = None
    """Values of K, and of V, in a pool row, as the kernels need it (``pallas_kernels.padded_head_dim``); None:
    ``head_dim``."""
    tiers: TierConfig | None = None
    """The quantised part, if there is one; ``num_blocks`` are then of prompts and of what stays unquantised."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "batch", "max_context", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if LANES % self.block_size:
            raise ValueError(f"block_size must divide {LANES}, got {self.block_size}; use 8, 16, 32, 64 or 128")
        if self.num_blocks < 2:
            raise ValueError(
                f"a cache needs the null block and at least one more, got num_blocks={self.num_blocks}; "
                "give it more memory"
            )

    @classmethod
    def for_model(
        cls,
        model: LlamaConfig,
        *,
        batch: int,
        max_context: int,
        num_blocks: int | None = None,
        memory: int | None = None,
        block_size: int = 16,
        dtype: jnp.dtype = jnp.float32,  # pyright: ignore[reportArgumentType]
        layout: BlockLayout | None = None,
        prompts: int | None = None,
    ) -> CacheConfig:
        """Sizes for a model: of ``num_blocks``, or as large as ``memory`` bytes hold, or for ``batch`` full contexts.

        Args:
          layout: that of quantised blocks, where the policy has tiers. Of ``memory`` they take what unquantised blocks
            for ``prompts`` full contexts (None: ``batch``) leave.

        Raises:
          ValueError: both sizes given, or ``memory`` too small for a single block.
        """
        if num_blocks is not None and memory is not None:
            raise ValueError(f"give num_blocks or memory, not both: {num_blocks=}, {memory=}")
        config = cls(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            batch=batch,
            max_context=max_context,
            num_blocks=2,
            block_size=block_size,
            dtype=dtype,
            padded_head_dim=padded_head_dim(model.head_dim),
        )
        if layout is not None:
            return config._with_tiers(layout, prompts or batch, num_blocks, memory)
        if memory is not None:
            num_blocks = (memory - config.table_bytes) // (config.block_bytes + 4)
            while num_blocks >= 2 and config.bytes_with(num_blocks) > memory:
                num_blocks -= 1
            if num_blocks < 2:
                least = config.bytes_with(2)
                raise ValueError(f"cache memory of {memory} bytes holds no block; it must be at least {least} bytes")
        elif num_blocks is None:
            num_blocks = 1 + batch * config.heads * config.max_blocks
        return replace(config, num_blocks=num_blocks)

    def _with_tiers(self, layout: BlockLayout, prompts: int, num_blocks: int | None, memory: int | None) -> CacheConfig:
        num_blocks = 1 + prompts * self.heads * self.max_blocks if num_blocks is None else num_blocks
        most = 1 + self.batch * self.heads * -(-self.max_context // layout.tokens)
        if memory is not None:
            bare = replace(self, num_blocks=num_blocks, tiers=TierConfig(layout=layout, num_blocks=0))
            room = memory - bare.bytes_with(num_blocks)
            most = min(most, room // (layout.block_bytes + 4))
            if most < 2:
                least = bare.bytes_with(num_blocks) + 2 * (layout.block_bytes + 4)
                raise ValueError(
                    f"cache memory of {memory} bytes leaves none for quantised blocks beside a prompt of "
                    f"{self.max_context} tokens that is being read; it must be at least {least} bytes"
                )
        return replace(self, num_blocks=num_blocks, tiers=TierConfig(layout=layout, num_blocks=most))

    @property
    def row_width(self) -> int:
        """Values of a pool row: K beside V."""
        return 2 * (self.padded_head_dim or self.head_dim)

    @property
    def heads(self) -> int:
        """KV heads of all layers."""
        return self.num_layers * self.num_kv_heads

    @property
    def max_blocks(self) -> int:
        return -(-self.max_context // self.block_size)

    def full_blocks(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens takes uncompressed."""
        return self.heads * -(-tokens // self.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: its K and V, and the score and the position of each of its slots."""
        return self.block_size * (self.row_width * np.dtype(self.dtype).itemsize + 8)

    @property
    def table_bytes(self) -> int:
        """Bytes of what doesn't grow with the pool: block tables, lengths, token and block counts."""
        row = self.max_blocks + 1
        if self.tiers is not None:
            row += self.tiers.max_blocks(self.max_context) + 6  # two lengths, values and indices of the weakest
        return 4 * self.batch * (self.heads * row + 2)

    def bytes_with(self, num_blocks: int) -> int:
        """Bytes of the whole cache with so many blocks: scores and positions come in whole rows."""
        slots = num_blocks * self.block_size
        rows = -(-slots // LANES)
        pool = slots * self.row_width * np.dtype(self.dtype).itemsize
        quantised = self.tiers.num_blocks * (self.tiers.layout.block_bytes + 4) + 4 if self.tiers is not None else 0
        return pool + rows * LANES * 8 + self.table_bytes + 4 * num_blocks + 4 + quantised


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedCache:
    """Donated at every jit boundary: after the call the old one is gone.

    ``pool``, ``scores`` and ``positions`` are indexed by token slot, ``block * block_size + offset``; the rest by
    layer, sequence and KV head. The order of a head's KVs is that of its table row, not of the text: after the first
    eviction ``positions`` alone tells where a KV stood.
    """

    pool: Array
    """``[blocks, block_size, row_width]``, K (after RoPE) beside V, each at the beginning of its half of the row.
    ``uint16`` where bfloat16 is kept as bits (``pallas_kernels.pool_values``)."""
    scores: Array
    """``f32[rows, 128]``: the eviction metric of each slot's KV."""
    positions: Array
    """``i32[rows, 128]``: the place in the text of each slot's KV."""
    block_table: Array
    """``i32[layers, batch, kv_heads, max_blocks]``; entries past a head's last block are never read."""
    lengths: Array
    """``i32[layers, batch, kv_heads]``: KVs that a head holds."""
    num_tokens: Array
    """``i32[batch]``: tokens of the text that the cache has seen, and so the next one's position."""
    shared: Array
    """``i32[batch]``: blocks at the beginning of each head that belong to a prefix (``jaxkv.cache.prefix``)."""
    free_blocks: Array
    """``i32[blocks]``: a stack, of which the first ``num_free`` are free."""
    num_free: Array
    """``i32[]``."""
    tiers: Tiers | None = None
    """The quantised part. Its KVs come before the unquantised ones wherever all of a head's are counted."""
    head_dim: int = field(metadata={"static": True})
    """Values of K, and of V, of a KV; a half of the row may be wider."""

    @property
    def block_size(self) -> int:
        return self.pool.shape[1]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, with the score and the position of each of its slots."""
        return self.block_size * (self.pool.shape[2] * self.pool.dtype.itemsize + 8)

    @property
    def capacity(self) -> int:
        """KVs that a head's table row can address."""
        return self.block_table.shape[-1] * self.block_size

    @property
    def quantised(self) -> Tiers:
        """The quantised part.

        Raises:
          ValueError: there is none.
        """
        if self.tiers is None:
            raise ValueError("this cache has no quantised tiers; give its CacheConfig the layout of the policy's")
        return self.tiers

    def blocks_held(self) -> Array:
        """``i32[layers, batch, kv_heads]`` unquantised."""
        return num_blocks(self.lengths, self.block_size)


def init_cache(config: CacheConfig) -> PagedCache:
    """An empty cache."""
    rows = -(-config.num_blocks * config.block_size // LANES)
    table = (config.num_layers, config.batch, config.num_kv_heads)
    return PagedCache(
        pool=jnp.zeros((config.num_blocks, config.block_size, config.row_width), pool_dtype(config.dtype)),
        scores=jnp.zeros((rows, LANES), jnp.float32),
        positions=jnp.zeros((rows, LANES), jnp.int32),
        block_table=jnp.zeros((*table, config.max_blocks), jnp.int32),
        lengths=jnp.zeros(table, jnp.int32),
        num_tokens=jnp.zeros(config.batch, jnp.int32),
        shared=jnp.zeros(config.batch, jnp.int32),
        # Popped from the end: the lowest blocks go first. The last entry is spare, since the null block is never free.
        free_blocks=(config.num_blocks - 1 - jnp.arange(config.num_blocks)).astype(jnp.int32),
        num_free=jnp.int32(config.num_blocks - 1),
        head_dim=config.head_dim,
        tiers=None
        if config.tiers is None
        else init_tiers(
            config.tiers,
            layers=config.num_layers,
            batch=config.batch,
            kv_heads=config.num_kv_heads,
            max_context=config.max_context,
        ),
    )


def num_blocks(lengths: Array, block_size: int) -> Array:
    """Blocks that so many KVs fill."""
    return -(-lengths // block_size)


def in_table_order(values: Array, block_table: Array, lengths: Array, block_size: int) -> Array:
    """Scores or positions of heads' KVs, ``[..., max_blocks * block_size]``; those past a head's end mean nothing.

    Args:
      values: ``[rows, 128]``, one a token slot.
      block_table: ``i32[..., max_blocks]``, of all layers or of one.
      lengths: ``i32[...]``.
      block_size: slots a block.
    """
    blocks = jnp.where(_holds_blocks(block_table, lengths, block_size), block_table, NULL_BLOCK)
    return slot_values.read_blocks(values, blocks, block_size).reshape(*lengths.shape, -1)


def to_slots(values: Array, block_table: Array, lengths: Array, new: Array) -> Array:
    """Scores or positions with those of the heads' blocks replaced by new, in table order; see ``in_table_order``."""
    new = new.reshape(*block_table.shape, -1)
    return slot_values.write_blocks(values, block_table, new, _holds_blocks(block_table, lengths, new.shape[-1]))


def _holds_blocks(block_table: Array, lengths: Array, block_size: int) -> Array:
    """``bool`` like the table: which entries are a head's."""
    return jnp.arange(block_table.shape[-1]) < num_blocks(lengths, block_size)[..., None]


def stamp_slots(cache: PagedCache, starts: Array, positions: Array, counts: Array) -> PagedCache:
    """Gives new KVs score 0, whatever their slot's last owner had, and their position in the text.

    Args:
      cache: its blocks for the new KVs are allocated.
      starts: ``i32[layers, batch, kv_heads]`` index of the first new KV within its head.
      positions: ``i32[batch, new]``.
      counts: ``i32[batch]`` how many of ``new`` are real.
    """
    place = jnp.arange(positions.shape[1])
    index = starts[..., None] + place  # [layers, batch, kv_heads, new]
    real = place < counts[None, :, None, None]
    column = jnp.minimum(index // cache.block_size, cache.block_table.shape[-1] - 1)
    block = jnp.take_along_axis(cache.block_table, column, axis=-1)
    slots = jnp.where(real, block * cache.block_size + index % cache.block_size, NULL_BLOCK)
    new = jnp.broadcast_to(positions[None, :, None], slots.shape)
    row, lane = slots // LANES, slots % LANES
    return replace(
        cache,
        scores=cache.scores.at[row, lane].set(0.0, mode="promise_in_bounds"),
        positions=cache.positions.at[row, lane].set(new, mode="promise_in_bounds"),
    )


def take_sequences(cache: PagedCache, sequences: Array) -> PagedCache:
    """A cache of only these rows of the batch, ``i32[n]``, over the same pool; give it back by ``put_sequences``."""
    return replace(
        cache,
        block_table=cache.block_table[:, sequences],
        lengths=cache.lengths[:, sequences],
        num_tokens=cache.num_tokens[sequences],
        shared=cache.shared[sequences],
        tiers=None if cache.tiers is None else cache.tiers.take(sequences),
    )


def put_sequences(cache: PagedCache, part: PagedCache, sequences: Array) -> PagedCache:
    """The whole cache again: rows ``sequences`` and the pool from ``part``, the other rows from ``cache``."""
    return replace(
        part,
        block_table=cache.block_table.at[:, sequences].set(part.block_table),
        lengths=cache.lengths.at[:, sequences].set(part.lengths),
        num_tokens=cache.num_tokens.at[sequences].set(part.num_tokens),
        shared=cache.shared.at[sequences].set(part.shared),
        tiers=None if cache.tiers is None or part.tiers is None else cache.tiers.put(part.tiers, sequences),
    )
