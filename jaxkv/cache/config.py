"""Sizes of a cache, and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxkv.cache.nbytes import nbytes
from jaxkv.cache.quantised import NoStore, QuantisedStore
from jaxkv.cache.raw import LANES, RawStore
from jaxkv.cache.shards import WHOLE, HeadShards, ShardedHeads, partition_specs
from jaxkv.cache.state import PagedCache
from jaxkv.checks import check_dtype, check_numbers, number
from models.interface import ModelSizes
from pallas_kernels import padded_head_dim
from pallas_kernels.quantised_block import BlockLayout

LISTED = 8
"""Bytes of a block in a free list."""


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """Sizes of the quantised store. ``num_blocks``, a device's, counts the null block."""

    layout: BlockLayout
    num_blocks: int

    def max_blocks(self, max_context: int) -> int:
        """Columns of a table row: enough for every KV in the high tier, and a part-filled block of each."""
        return -(-max_context // self.layout.tokens) + 2

    def full_blocks(self, max_context: int) -> int:
        """Blocks that a head takes at most: every KV in the high tier, or a part-filled low block beside."""
        return -(-max_context // self.layout.tokens) + 1


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Sizes of a cache. ``num_blocks`` counts the null block; where the KV heads are split over devices, each has a
    pool of so many, and all counts of blocks are of one device."""

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
    """The quantised store, if there is one; ``num_blocks`` are then of prompts and of what stays unquantised."""
    shards: HeadShards = WHOLE
    """How the KV heads are split over devices."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_dtype(self.dtype, "the cache's dtype")
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
        if self.num_kv_heads % self.shards.count:
            raise ValueError(
                f"{self.num_kv_heads} KV heads can't be split evenly over {self.shards.count} devices; take "
                f"{', '.join(str(n) for n in range(1, self.num_kv_heads + 1) if self.num_kv_heads % n == 0)}"
            )

    @classmethod
    def for_model(
        cls,
        model: ModelSizes,
        *,
        batch: int,
        max_context: int,
        num_blocks: int | None = None,
        memory: int | None = None,
        block_size: int = 16,
        dtype: jnp.dtype = jnp.float32,  # pyright: ignore[reportArgumentType]
        layout: BlockLayout | None = None,
        prompts: int | None = None,
        shards: HeadShards = WHOLE,
    ) -> CacheConfig:
        """Sizes for a model: of ``num_blocks``, or as large as ``memory`` bytes hold, or for ``batch`` full contexts.

        Args:
          layout: that of quantised blocks, where the policy has tiers. Of ``memory`` they take what unquantised blocks
            for ``prompts`` full contexts (None: ``batch``) leave.
          memory: of all devices together.
          shards: how the KV heads are split over devices.

        Raises:
          ValueError: both sizes given, KV heads that can't be split so, or ``memory`` too small for a single block.
        """
        if num_blocks is not None and memory is not None:
            raise ValueError(f"give num_blocks or memory, not both: {num_blocks=}, {memory=}")
        memory = None if memory is None else number(memory, "memory")
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
            shards=shards,
        )
        if layout is not None:
            full = 1 + (prompts or batch) * config.full_blocks(max_context)
            return replace(config, num_blocks=full if num_blocks is None else num_blocks)._with_tiers(layout, memory)
        if memory is not None:
            return config._within(memory)
        return replace(
            config, num_blocks=1 + batch * config.full_blocks(max_context) if num_blocks is None else num_blocks
        )

    def _within(self, memory: int) -> CacheConfig:
        """With as many blocks as so many bytes hold."""
        each = self.shards.count * (self.block_bytes + LISTED)
        blocks = _most(memory, (memory - self.table_bytes) // each, self.bytes_with)
        if blocks < 2:
            one = self.bytes_with(1 + self.full_blocks(self.max_context))
            raise ValueError(
                f"cache memory of {memory} bytes holds no block; give at least {one} bytes, which hold a sequence of "
                f"{self.max_context} tokens whole"
            )
        return replace(self, num_blocks=blocks)

    def _with_tiers(self, layout: BlockLayout, memory: int | None) -> CacheConfig:
        """With quantised blocks in what the unquantised ones leave, or for ``batch`` full contexts."""

        def sized(blocks: int) -> CacheConfig:
            return replace(self, tiers=TierConfig(layout=layout, num_blocks=blocks))

        one = self.heads * TierConfig(layout=layout, num_blocks=2).full_blocks(self.max_context)
        most = 1 + self.batch * one
        if memory is not None:
            each = self.shards.count * (layout.block_bytes + LISTED)
            fixed = sized(2).nbytes - 2 * each
            most = min(most, (memory - fixed) // each)
            if most < 2:
                raise ValueError(
                    f"cache memory of {memory} bytes leaves none for quantised blocks beside a prompt of "
                    f"{self.max_context} tokens that is being read; give at least {sized(1 + one).nbytes} bytes, "
                    "which hold it whole"
                )
        return sized(most)

    @property
    def row_width(self) -> int:
        """Values of a pool row: K beside V."""
        return 2 * (self.padded_head_dim or self.head_dim)

    @property
    def all_heads(self) -> int:
        """KV heads of all layers."""
        return self.num_layers * self.num_kv_heads

    @property
    def heads(self) -> int:
        """Those that a device has."""
        return self.all_heads // self.shards.count

    @property
    def max_blocks(self) -> int:
        return -(-self.max_context // self.block_size)

    def full_blocks(self, tokens: int) -> int:
        """Blocks of a device that a sequence of so many tokens takes uncompressed."""
        return self.heads * -(-tokens // self.block_size)

    @cached_property
    def shapes(self) -> PagedCache:
        """The cache's arrays by shape and dtype, without memory."""
        return jax.eval_shape(partial(init_cache, self))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache: pools, scores, positions, tables, free lists."""
        return nbytes(self.shapes)

    def bytes_with(self, num_blocks: int) -> int:
        """Bytes of the whole cache with so many unquantised blocks."""
        return replace(self, num_blocks=num_blocks).nbytes

    @property
    def block_bytes(self) -> int:
        """Bytes of an unquantised block: its K and V, and the score and the position of each of its slots."""
        return self.shapes.raw.block_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of what doesn't grow with the pools: block tables, lengths, token and block counts."""
        row = self.shapes.raw.tables.row_bytes + self.shapes.quantised.row_bytes
        return self.batch * row + nbytes(self.shapes.num_tokens)


def _most(memory: int, guess: int, bytes_with: Callable[[int], int]) -> int:
    """The most blocks that so many bytes hold: the guess, which is too large by few at most."""
    while guess >= 2 and bytes_with(guess) > memory:
        guess -= 1
    return guess


def init_cache(config: CacheConfig, mesh: Mesh | None = None) -> PagedCache:
    """An empty cache; where its heads are split over devices, on those of ``mesh``, each with its part."""
    if mesh is not None:
        axis = config.shards.axis if isinstance(config.shards, ShardedHeads) else ""
        places = jax.tree.map(partial(NamedSharding, mesh), partition_specs(config.shapes, axis))
        return jax.jit(partial(init_cache, config), out_shardings=places)()
    heads = (config.num_layers, config.batch, config.num_kv_heads)
    return PagedCache(
        raw=RawStore.empty(
            heads,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_blocks=config.max_blocks,
            row_width=config.row_width,
            head_dim=config.head_dim,
            dtype=config.dtype,
            hadamard=config.tiers is not None and config.tiers.layout.hadamard,
            shards=config.shards,
        ),
        quantised=NoStore() if config.tiers is None else _empty_quantised(heads, config, config.tiers),
        num_tokens=jnp.zeros(config.batch, jnp.int32),
    )


def _empty_quantised(heads: tuple[int, int, int], config: CacheConfig, tiers: TierConfig) -> QuantisedStore:
    return QuantisedStore.empty(
        heads,
        layout=tiers.layout,
        num_blocks=tiers.num_blocks,
        max_blocks=tiers.max_blocks(config.max_context),
        shards=config.shards,
    )
