"""SnapKV (arXiv 2404.14469), and the two that share its score and give heads or layers different budgets."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.checks import shown
from jaxkv.compression.budget import MOST
from jaxkv.compression.evict import Evict
from jaxkv.compression.observation import LastQueries
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.shares import PerHead, PerLayer, Pyramid, Shares


@dataclass(frozen=True, kw_only=True)
class PooledAttention(Scorer):
    """The mean attention of the last queries, mean-pooled along the keys, mean over the group."""

    window: int
    pool: int

    @property
    def observes(self) -> LastQueries:
        return LastQueries(count=self.window)

    def score(self, mass: Array, held: Array) -> Array:
        mass = jnp.where(held, mass.mean(-2) / self.window, 0.0)
        window = (1,) * (mass.ndim - 1) + (self.pool,)
        return lax.reduce_window(mass, 0.0, lax.add, window, (1,) * mass.ndim, "SAME") / self.pool


@dataclass(frozen=True, kw_only=True)
class SnapKV(Method):
    """The mean attention of the last queries, mean-pooled along the keys, mean over the group; each head the same."""

    window: int = 32
    """Last queries of the prompt that are observed."""
    pool: int = 5
    """Width of the mean-pool along the keys; what lies past either end counts as 0."""
    shares: Shares = PerHead()

    def __post_init__(self) -> None:
        if self.window is None:  # all queries, as kv-compress would understand it
            object.__setattr__(self, "window", 0)
        super().__post_init__()
        if not 1 <= self.window <= MOST:
            given = shown(self.window)
            raise ValueError(
                f"window must be at least 1 query and below 2**31, got {given}; kv-compress can observe all"
            )
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and at least 1, got {shown(self.pool)}")

    def parts(self) -> tuple[Scorer, Placement]:
        return PooledAttention(window=self.window, pool=self.pool), Evict(shares=self.shares)


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """The heads of a layer compete for its budget, a fifth of an equal share is each one's own (arXiv 2407.11550)."""

    shares: Shares = PerLayer(floor=0.2)


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Lower layers keep more (arXiv 2406.02069)."""

    window: int = 8
    shares: Shares = PerHead(layers=Pyramid())
