"""SnapKV (arXiv 2404.14469), and the two that share its score and give heads or layers different budgets."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.compression.policy import Policy
from jaxkv.compression.shares import PerHead, PerLayer, Pyramid, Shares


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """The mean attention of the last queries, mean-pooled along the keys, mean over the group; each head the same."""

    window: int = 32
    """Last queries of the prompt that are observed."""
    pool: int = 5
    """Width of the mean-pool along the keys; what lies past either end counts as 0."""
    shares: Shares = PerHead()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None or self.window < 1:
            raise ValueError(f"window must be at least 1 query, got {self.window or 0}; kv-compress can observe all")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and at least 1, got {self.pool}")

    @property
    def observed_queries(self) -> int:
        return self.window

    def of_prompt(self, mass: Array, held: Array) -> Array:
        mass = jnp.where(held, mass.mean(-2) / self.window, 0.0)
        window = (1,) * (mass.ndim - 1) + (self.pool,)
        return lax.reduce_window(mass, 0.0, lax.add, window, (1,) * mass.ndim, "SAME") / self.pool


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """The heads of a layer compete for its budget, a fifth of an equal share is each one's own (arXiv 2407.11550)."""

    shares: Shares = PerLayer(floor=0.2)


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Lower layers keep more (arXiv 2406.02069)."""

    window: int = 8
    shares: Shares = PerHead(layers=Pyramid())
