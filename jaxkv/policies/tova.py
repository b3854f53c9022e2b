"""TOVA (arXiv 2401.06104): what the last token attends to, the same tokens in all heads of a layer."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.compression.policy import Policy
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """The last query's attention, mean over all heads of the layer. Only the last token itself is protected."""

    protected_window: int = 2
    shares: Shares = PerHead()

    @property
    def observed_queries(self) -> int:
        return 1

    def of_prompt(self, mass: Array, held: Array) -> Array:
        return jnp.broadcast_to(mass.mean((-3, -2))[..., None, :], held.shape)
