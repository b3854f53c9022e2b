"""How the heads of a sequence share its budget, whatever they are scored by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.checks import check_numbers, shown
from jaxkv.compression.ranking import KEPT, sort_keys, take_cheapest


def even(layers: int) -> Array:
    """Each layer the same."""
    return jnp.ones(layers, jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """Weights that fall linearly from the first layer to the last (PyramidKV, arXiv 2406.02069, section 4.2).

    The last layer gets ``1 / slope`` of the mean, the first as much more than the mean as the last gets less.
    """

    slope: float = 20.0

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.slope >= 1:
            raise ValueError(f"slope must be at least 1 (1 gives each layer the same), got {shown(self.slope)}")

    def __call__(self, layers: int) -> Array:
        return jnp.linspace(2 - 1 / self.slope, 1 / self.slope, layers, dtype=jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Shares(ABC):
    """Splits a sequence's blocks over groups of heads; within a group the scores decide."""

    floor: float = 0.0
    """Part of an equal share of its group that each head keeps, whatever its scores (Ada-KV's alpha)."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a part of an equal share, from 0 to 1, got {self.floor}")

    @abstractmethod
    def keep(self, blocks: Array, may_go: Array, evict_blocks: Array) -> Array:
        """Blocks that each group keeps.

        Args:
          blocks: ``i32[batch, layers, kv_heads]`` held.
          may_go: ``bool[batch, layers, kv_heads, rows]``, as many True as blocks of the head could go.
          evict_blocks: ``i32[batch]``.

        Returns:
          ``i32[batch, groups]``, of equal numbers of heads in the order of layers, then heads.
        """


@dataclass(frozen=True, kw_only=True)
class Global(Shares):
    """All heads of all layers compete (KV-Compress, KVzip)."""

    def keep(self, blocks: Array, may_go: Array, evict_blocks: Array) -> Array:
        return blocks.sum((1, 2), dtype=jnp.int32)[:, None] - evict_blocks[:, None]


@dataclass(frozen=True, kw_only=True)
class PerLayer(Shares):
    """Each layer has its own budget, for which its heads compete (Ada-KV)."""

    layers: Callable[[int], Array] = even
    """Weights of so many layers."""

    def keep(self, blocks: Array, may_go: Array, evict_blocks: Array) -> Array:
        return apportion(self.layers(blocks.shape[1]), blocks, may_go, evict_blocks)


@dataclass(frozen=True, kw_only=True)
class PerHead(Shares):
    """Each head has its own budget (SnapKV and most others)."""

    layers: Callable[[int], Array] = even
    """Weights of so many layers."""

    def keep(self, blocks: Array, may_go: Array, evict_blocks: Array) -> Array:
        batch, layers, kv_heads = blocks.shape
        weights = jnp.repeat(self.layers(layers), kv_heads)
        heads = batch, layers * kv_heads, 1
        return apportion(weights, blocks.reshape(heads), may_go.reshape(*heads, -1), evict_blocks)


def apportion(weights: Array, blocks: Array, may_go: Array, evict_blocks: Array) -> Array:
    """Blocks that each group keeps: in proportion to its weight, and in all exactly as many as are left.

    A group's j-th block is bid for at ``(j + 1/2) / weight`` (Sainte-Laguë), and the lowest bids win; what can't go
    comes before them, and a group never keeps more than it holds.

    Args:
      weights: ``f32[groups]``, positive.
      blocks: ``i32[batch, groups, heads]``, held.
      may_go: ``bool[batch, groups, heads, rows]``.
      evict_blocks: ``i32[batch]``.

    Returns:
      ``i32[batch, groups]``.
    """
    batch, groups, heads, rows = may_go.shape
    held = blocks.sum(-1, dtype=jnp.int32)
    must_stay = held - may_go.sum((-1, -2), dtype=jnp.int32)
    place = jnp.arange(heads * rows, dtype=jnp.int32)
    bid = jnp.where(place < must_stay[..., None], 0.0, (place.astype(jnp.float32) + 0.5) / weights[:, None])
    bid = jnp.where(place < held[..., None], sort_keys(bid), KEPT)
    kept = take_cheapest(bid.reshape(batch, -1), held.sum(-1, dtype=jnp.int32) - evict_blocks)
    return kept.reshape(batch, groups, -1).sum(-1, dtype=jnp.int32)
