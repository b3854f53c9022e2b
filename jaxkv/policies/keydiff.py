"""KeyDiff (arXiv 2504.15364): keys unlike the others are kept."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.compression.policy import Policy
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """The keys most similar, by cosine, to the mean of all normalised keys of their head go first."""

    shares: Shares = PerHead()

    @property
    def reads_kvs(self) -> bool:
        return True

    def of_kvs(self, scores: Array, keys: Array, values: Array, positions: Array, held: Array) -> Array:
        unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        anchor = jnp.where(held[..., None], unit, 0.0).sum(-2)  # its length changes no cosine's order
        anchor /= jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -jnp.einsum("bhkd,bhd->bhk", unit, anchor)
