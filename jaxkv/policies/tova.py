"""TOVA (arXiv 2401.06104): what the last token attends to, the same tokens in all heads of a layer."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.compression.evict import Evict
from jaxkv.compression.observation import LastQueries
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class LastAttention(Scorer):
    """The last query's attention, mean over all heads of the layer."""

    @property
    def observes(self) -> LastQueries:
        return LastQueries(count=1)

    def score(self, mass: Array, held: Array) -> Array:
        return jnp.broadcast_to(mass.mean((-3, -2))[..., None, :], held.shape)


@dataclass(frozen=True, kw_only=True)
class TOVA(Method):
    """The last query's attention, mean over all heads of the layer. Only the last token itself is protected."""

    protected_window: int = 2
    shares: Shares = PerHead()

    def parts(self) -> tuple[Scorer, Placement]:
        return LastAttention(), Evict(shares=self.shares)
