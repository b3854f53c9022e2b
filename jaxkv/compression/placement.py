"""Where each KV of a sequence shall live: what a policy does with its ranking and its budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxkv.cache.config import CacheConfig
from jaxkv.cache.contents import Contents
from jaxkv.cache.moves import Goal
from jaxkv.cache.state import PagedCache
from jaxkv.compression.budget import Budget, Footprint
from jaxkv.compression.scorer import Scorer
from pallas_kernels.paged_attention import Significance
from pallas_kernels.quantised_block import BlockLayout


class Worth(NamedTuple):
    """What a policy thinks of the KVs of one sequence; arrays are in the order of its ``Contents``."""

    rank: Array
    """The lowest go first."""
    protected: Array
    """``bool``: must stay."""


class Step(NamedTuple):
    """What becomes of the quantised KVs of each head before a decode step, ``[layers, batch, kv_heads]``."""

    lengths: Array
    """``i32[..., 2]`` afterwards."""
    new: Array
    """``i32`` index in the high tier where the new token goes."""
    lowered: Array
    """``i32`` index in the high tier of the KV that is requantised."""
    to: Array
    """``i32`` index in the low tier where that one goes; -1: none is."""


class Claim(NamedTuple):
    """Room for one more token in each active row. Only tables have changed; KVs move in the pass that follows."""

    cache: PagedCache
    granted: Array
    """``bool[]``: there is room for all of them; else nothing has changed."""
    step: Step | None = None
    """Where the token is quantised at once; None: it is cached unquantised."""
    significance: Significance | None = None
    """How decoding changes the quantised KVs' scores."""


@dataclass(frozen=True, kw_only=True)
class Placement(ABC):
    """Base of all placements. Static to jit, so it is frozen and hashable."""

    @property
    def quantises_decoding(self) -> bool:
        """Whether a decoded token is quantised at once, or cached unquantised."""
        return False

    def layout(self, head_dim: int) -> BlockLayout | None:
        """Of the quantised blocks that it needs; None: it needs none."""
        return None

    def check(self, config: CacheConfig, budget: Budget, protected_window: int, sinks: int) -> None:
        """Raises ValueError where a cache of these sizes can't keep the budget, whatever the text."""
        budget.check(config, protected_window)

    def block_bytes(self, cache: PagedCache) -> int:
        """Of the blocks that ``room`` counts."""
        return cache.raw.block_bytes

    def room(self, budget: Budget, of: Footprint, cache: PagedCache) -> Array | int:
        """``i32[]``: blocks, of ``block_bytes`` each, that a sequence may hold."""
        return budget.unquantised_blocks(of)

    def due(self, cache: PagedCache, room: Array) -> Array:
        """``bool[]``: whether there is anything to do for the one sequence of a cache that may hold so many blocks."""
        return cache.num_tokens[0] > 0

    @abstractmethod
    def goal(self, cache: PagedCache, now: Contents, worth: Worth, room: Array) -> Goal:
        """Where each KV of the one sequence of a cache shall live.

        Args:
          cache: of one row.
          now: what it holds.
          worth: what the policy thinks of that.
          room: ``i32[]`` blocks that it may hold, of ``block_bytes`` each.
        """

    def ranks_decoded(self, scorer: Scorer) -> bool:
        """Whether what was decoded can be ranked, so that a sequence can be compressed again."""
        return scorer.ranks_decoded

    def raw_tokens(self, protected_window: int, sinks: int) -> int | None:
        """KVs of a head that may stay unquantised where a sequence is compressed; None: any number."""
        return None

    def observes_decoding(self, scorer: Scorer) -> bool:
        """Whether the scorer's view of decoded tokens' attention reaches the scores."""
        return scorer.observes_decoding

    def rescored(self, scores: Array, positions: Array, num_tokens: Array, observed: Array) -> tuple[Array, Array]:
        """Scores and stored positions where a text was read on, from the scores by the new prompt's last queries.

        Args:
          scores: ``f32[layers, batch, kv_heads, kvs]``.
          positions: ``i32`` like ``scores``.
          num_tokens: ``i32[batch]``: tokens of the text so far.
          observed: ``i32[batch]``: how many queries were observed.
        """
        return scores, positions

    def claim(self, cache: PagedCache, active: Array) -> Claim:
        """Room for one more token in each of the rows, ``bool[batch]``."""
        return claim_raw(cache, active)


def claim_raw(cache: PagedCache, active: Array) -> Claim:
    """Room for the tokens in the unquantised store."""
    within = cache.within_capacity(cache.lengths + 1, active)
    lengths = cache.raw.tables.lengths + (active & within).astype(jnp.int32)[None, :, None, None]
    tables, found = cache.raw.tables.grow(lengths, most=1)
    return Claim(replace(cache, raw=replace(cache.raw, tables=tables)), found & within)
