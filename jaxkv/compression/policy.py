"""What decides which KVs stay: a scorer, a budget and a placement."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Self

import jax.numpy as jnp
from jax import Array

from jaxkv.cache.config import CacheConfig
from jaxkv.cache.contents import Contents
from jaxkv.cache.state import PagedCache
from jaxkv.checks import check_numbers, shown
from jaxkv.compression.budget import IN_WORDS, MOST, Budget, Footprint, budget_in_words
from jaxkv.compression.evict import Evict
from jaxkv.compression.placement import Placement, Worth
from jaxkv.compression.scorer import Scorer
from models.interface import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How attention becomes a score, how much stays, and where: static to jit, so frozen and hashable.

    Raises:
      ValueError: no budget or two, or a setting out of range.
    """

    budget: Budget = None  # pyright: ignore[reportAssignmentType]  # until it is made
    """Or one of the next three."""
    ratio: float | None = field(default=None, repr=False, compare=False)
    """Short for ``budget=Ratio(ratio)``. It and the next two become the budget, and are None afterwards."""
    max_cache_tokens: int | None = field(default=None, repr=False, compare=False)
    """Short for ``budget=MaxTokens(max_cache_tokens)``."""
    max_cache_bytes: int | None = field(default=None, repr=False, compare=False)
    """Short for ``budget=MaxBytes(max_cache_bytes)``."""
    scorer: Scorer
    placement: Placement = Evict()
    protected_window: int = 32
    """Newest tokens that never go, the sampled but not yet cached one included."""
    sinks: int = 0
    """First tokens of the text that never go."""
    compress_every: int | None = None
    """Compress again whenever a sequence's tokens are a multiple of this; None: once, after the prompt."""

    def __post_init__(self) -> None:
        check_numbers(self)
        self._take_budget()
        if what := self.scorer.never_asked:
            raise ValueError(
                f"{type(self.scorer).__name__} has a {what} that nobody calls, since it observes nothing: override "
                "observes, such as by LastQueries(count=16), or score KVs by score_kvs or rank"
            )
        if self.protected_window < 1:
            raise ValueError(f"protected_window must be at least 1, got {shown(self.protected_window)}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {shown(self.sinks)}")
        if self.compress_every is not None and self.compress_every < 1:
            raise ValueError(f"compress_every must be at least 1 token, got {shown(self.compress_every)}")
        for name in ("protected_window", "sinks", "compress_every"):
            if (getattr(self, name) or 0) > MOST:
                raise ValueError(f"{name} must be below 2**31, got {shown(getattr(self, name))}")
        if self.compress_every is not None and not self.placement.ranks_decoded(self.scorer):
            raise ValueError(
                f"compress_every={self.compress_every}: {self} doesn't rank what is decoded, so just that would be "
                "evicted; leave it out, or take kv-compress, h2o, streaming-llm or leankv"
            )

    def _take_budget(self) -> None:
        """Has what says the budget as a number become the budget; a class's own default gives way to it."""
        said = budget_in_words(vars(self))
        if said is not None:
            if self.budget is not type(self).budget:
                raise ValueError(f"give a budget or a {', a '.join(IN_WORDS)}, not both: got {self.budget} and {said}")
            for name, value in {**dict.fromkeys(IN_WORDS), "budget": said}.items():
                object.__setattr__(self, name, value)  # the one way into a frozen dataclass
        if self.budget is None:
            raise ValueError(f"{self} needs a budget: write ratio=8, or budget=Ratio(8)")
        if not isinstance(self.budget, Budget):
            raise ValueError(f"budget must be one, got {shown(self.budget)}; write ratio=8, or budget=Ratio(8)")

    def __str__(self) -> str:
        return type(self).__name__ if type(self) is not Policy else type(self.scorer).__name__

    def check(self, config: CacheConfig) -> None:
        """Raises ValueError where a cache of these sizes can't keep the budget, whatever the text."""
        self.placement.check(config, self.budget, self.protected_window, self.sinks)

    def for_model(self, sizes: ModelSizes) -> Self:
        """The policy with what it leaves to the model filled in, told by its ``models.ModelSizes``."""
        return self

    @property
    def observes_decoding(self) -> bool:
        """Whether decoded tokens' attention is to be added to scores: what is never compressed again needs none."""
        return self.compress_every is not None and self.placement.observes_decoding(self.scorer)

    def faded(self, scores: Array, positions: Array, num_tokens: Array) -> Array:
        """What scores to which decoding adds become when a sequence is compressed again.

        A sum over all queries would keep the oldest KVs, which were seen by most, whatever came later. So each
        time it is scaled as if no more queries had been summed than the protected window has: what stays of the past
        beside the queries since then. It is a mean, too, of KVs that are older than both.

        Args:
          scores: ``f32[layers, batch, kv_heads, kvs]``.
          positions: ``i32`` like ``scores``.
          num_tokens: ``i32[batch]``.
        """
        age = num_tokens[None, :, None, None] - positions
        summed = jnp.minimum(age, self.protected_window + (self.compress_every or 0))
        few = jnp.minimum(age, self.protected_window)
        return scores * few.astype(jnp.float32) / jnp.maximum(summed, 1).astype(jnp.float32)

    @property
    def acts_in_decoding(self) -> bool:
        """Whether decode steps differ from those without a policy."""
        return self.compress_every is not None or self.observes_decoding or self.placement.quantises_decoding

    def worth(self, cache: PagedCache, now: Contents) -> Worth:
        """What it thinks of the KVs of a cache."""
        rank = self.scorer.rank(now.scores, now.positions)
        return Worth(rank, self.protects(now.positions, cache.num_tokens))

    def protects(self, positions: Array, num_tokens: Array) -> Array:
        """Which KVs must stay: ``i32[layers, batch, kv_heads, kvs]``, ``i32[batch]`` -> ``bool``."""
        last = num_tokens[None, :, None, None]  # position of the token that is sampled but not yet cached
        return (positions > last - self.protected_window) | (positions < self.sinks)

    def room(self, cache: PagedCache, tokens: Array) -> Array | int:
        """``i32[]``: blocks, of ``placement.block_bytes`` each, that the one sequence of a cache may hold by the budget
        of so many tokens."""
        of = Footprint.of_sequence(cache, tokens, self.protected_window)
        return self.placement.room(self.budget, of, cache)


@dataclass(frozen=True, kw_only=True)
class Method(Policy):
    """Base of the policies that have a name of their own: their settings make their scorer and their placement."""

    scorer: Scorer = field(init=False, repr=False)
    placement: Placement = field(init=False, repr=False)

    @abstractmethod
    def parts(self) -> tuple[Scorer, Placement]: ...

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, part in zip(("scorer", "placement"), self.parts(), strict=True):
            object.__setattr__(self, name, part)  # the one way into a frozen dataclass
        super().__post_init__()
