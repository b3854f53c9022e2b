"""KeyDiff (arXiv 2504.15364): keys unlike the others are kept."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.compression.evict import Evict
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class UnlikeTheMean(Scorer):
    """The keys most similar, by cosine, to the mean of all normalised keys of their head go first."""

    def score_kvs(
        self, scores: Array, keys: Array, values: Array, positions: Array, held: Array, layer: Array
    ) -> Array:
        unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        anchor = jnp.where(held[..., None], unit, 0.0).sum(-2)  # its length changes no cosine's order
        anchor /= jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -jnp.einsum("bhkd,bhd->bhk", unit, anchor)


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Method):
    """The keys most similar to their head's mean go first."""

    shares: Shares = PerHead()

    def parts(self) -> tuple[Scorer, Placement]:
        return UnlikeTheMean(), Evict(shares=self.shares)
