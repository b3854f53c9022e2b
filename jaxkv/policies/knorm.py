"""KNorm (arXiv 2406.11430): a key of small norm tends to be attended to."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.compression.evict import Evict
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class ShortKeys(Scorer):
    """The longest keys go first."""

    @property
    def settled(self) -> bool:
        return True

    def score_kvs(
        self, scores: Array, keys: Array, values: Array, positions: Array, held: Array, layer: Array
    ) -> Array:
        return -jnp.linalg.norm(keys, axis=-1)


@dataclass(frozen=True, kw_only=True)
class KNorm(Method):
    """The longest keys go first."""

    shares: Shares = PerHead()

    def parts(self) -> tuple[Scorer, Placement]:
        return ShortKeys(), Evict(shares=self.shares)
