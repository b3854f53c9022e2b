"""KNorm (arXiv 2406.11430): a key of small norm tends to be attended to."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.compression.policy import Policy
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """The longest keys go first."""

    shares: Shares = PerHead()

    @property
    def reads_kvs(self) -> bool:
        return True

    def of_kvs(self, scores: Array, keys: Array, values: Array, positions: Array, held: Array) -> Array:
        return -jnp.linalg.norm(keys, axis=-1)
