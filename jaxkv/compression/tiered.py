"""What the placements have in common that keep KVs at two precisions."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.cache.config import CacheConfig
from jaxkv.cache.state import PagedCache
from jaxkv.checks import check_numbers, shown
from jaxkv.compression.budget import Budget, Footprint
from jaxkv.compression.placement import Placement
from jaxkv.compression.scorer import Scorer
from pallas_kernels.dispatch import block_low_step, block_tile
from pallas_kernels.quantised_block import BlockLayout, Format

K8V4 = Format(key_bits=8, value_bits=4)
K4V2 = Format(key_bits=4, value_bits=2)


@dataclass(frozen=True, kw_only=True)
class Tiered(Placement):
    """Base of placements in blocks of two precisions; its own ``goal`` is still to be said."""

    high: Format = K8V4
    low: Format = K4V2
    block_tokens: int = 64
    """KVs in a high block."""
    hadamard: bool = False
    """K and V are turned by a Hadamard matrix before they are quantised: for keys with outlier channels."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("high", "low"):
            if not isinstance(format := getattr(self, name), Format):
                raise ValueError(f"{name} must be a format, such as Format.named('K8V4'), got {shown(format)}")

    def layout(self, head_dim: int) -> BlockLayout:
        return BlockLayout(
            head_dim=head_dim,
            high=self.high,
            low=self.low,
            tokens=self.block_tokens,
            tile=block_tile(),
            low_step=block_low_step(head_dim),
            hadamard=self.hadamard,
        )

    def block_bytes(self, cache: PagedCache) -> int:
        return self.layout(cache.raw.head_dim).block_bytes

    def room(self, budget: Budget, of: Footprint, cache: PagedCache) -> Array | int:
        return budget.blocks(of, self.block_bytes(cache))

    def check(self, config: CacheConfig, budget: Budget, protected_window: int, sinks: int) -> None:
        given = budget.fixed_bytes(config)
        if given is None:
            return
        layout, protected = self.layout(config.head_dim), self.protected_tokens(protected_window, sinks)
        raw = self.raw_tokens(protected_window, sinks)
        need = max(1, -(-(protected - raw) // layout.tokens)) * layout.block_bytes
        need += -(-raw // config.block_size) * config.block_bytes
        need *= config.all_heads
        if given < need:
            raise ValueError(
                f"{budget} leaves a sequence {given} bytes of blocks, but a block a head and the protected {protected} "
                f"tokens take {need}; give more, or a smaller protected_window"
            )

    def protected_tokens(self, protected_window: int, sinks: int) -> int:
        """KVs that a head keeps of any text."""
        return protected_window

    def raw_tokens(self, protected_window: int, sinks: int) -> int:
        return 0

    def ranks_decoded(self, scorer: Scorer) -> bool:
        """Where the scorer does, and its queries tell of all keys: a decode step knows of quantised ones not how far
        back they are."""
        return scorer.ranks_decoded and not (scorer.observes_decoding and scorer.observes.buffer)

    def room_in_tables(self, cache: PagedCache, room: Array) -> Array:
        """``i32[]``: quantised blocks that the one sequence of a cache may hold: at least one a head."""
        layers, _, kv_heads = cache.raw.lengths.shape
        heads = layers * kv_heads * cache.shards.count
        return jnp.clip(room, heads, heads * cache.tiers.tables.max_blocks).astype(jnp.int32)
