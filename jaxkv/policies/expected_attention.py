"""Expected Attention (arXiv 2510.00636): what queries like the prompt's would attend to after it."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.compression.policy import Policy
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Expected attention at the next positions, mean over the group, times the norm of the value.

    The sinks neither count as queries nor as keys, as in the authors' code (kvpress).
    """

    future: int = 512
    """Positions after the prompt over which the rotation is averaged."""
    epsilon: float = 0.0
    """Added to the attention before it is weighted; with ``PerLayer`` shares the authors take 0.01."""
    protected_window: int = 2
    sinks: int = 4
    shares: Shares = PerHead()

    @property
    def expected_queries(self) -> int:
        return self.future

    @property
    def reads_kvs(self) -> bool:
        return True

    def of_prompt(self, mass: Array, held: Array) -> Array:
        return mass.mean(-2)

    def of_kvs(self, scores: Array, keys: Array, values: Array, positions: Array, held: Array) -> Array:
        return (scores + self.epsilon) * jnp.linalg.norm(values, axis=-1)
