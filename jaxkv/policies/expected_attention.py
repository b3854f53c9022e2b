"""Expected Attention (arXiv 2510.00636): what queries like the prompt's would attend to after it."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.checks import shown
from jaxkv.compression.evict import Evict
from jaxkv.compression.observation import ExpectedQueries
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class ExpectedMass(Scorer):
    """Expected attention, mean over the group, times the norm of the value."""

    future: int
    epsilon: float

    @property
    def observes(self) -> ExpectedQueries:
        return ExpectedQueries(count=self.future)

    def score(self, mass: Array, held: Array) -> Array:
        return mass.mean(-2)

    def score_kvs(
        self, scores: Array, keys: Array, values: Array, positions: Array, held: Array, layer: Array
    ) -> Array:
        return (scores + self.epsilon) * jnp.linalg.norm(values, axis=-1)


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Method):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1:
            raise ValueError(f"future must be at least 1 position after the prompt, got {shown(self.future)}")

    def parts(self) -> tuple[Scorer, Placement]:
        return ExpectedMass(future=self.future, epsilon=self.epsilon), Evict(shares=self.shares)
