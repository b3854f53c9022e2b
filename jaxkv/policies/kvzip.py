"""KVzip (arXiv 2505.23416): what the model attends to when it reads the context a second time."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxkv.checks import shown
from jaxkv.compression.evict import Evict
from jaxkv.compression.observation import Reread
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.shares import Global, Shares


@dataclass(frozen=True, kw_only=True)
class SecondReading(Scorer):
    """The strongest attention that a KV gets while the context is reconstructed from it; see ``KVzip``."""

    power: int = 4
    group: Callable[..., Array] = jnp.max

    @property
    def observes(self) -> Reread:
        return Reread()

    def weigh(self, probability: Array) -> Array:
        return probability**self.power

    def score(self, mass: Array, held: Array) -> Array:
        return self.group(mass ** (1 / self.power), axis=-2)


@dataclass(frozen=True, kw_only=True)
class KVzip(Method):
    """The strongest attention that a KV gets while the context is reconstructed from it, over queries and group.

    The context follows itself in chunks that don't see each other and aren't cached. The maximum over queries is a
    norm of high order, which ranks almost like it and is a sum, as the kernels make it.
    """

    power: int = 4
    """Order of the norm over the queries: 1 is the sum."""
    group: Callable[..., Array] = jnp.max
    """How the query heads of a KV head are joined, each with its own norm: ``jnp.max`` or ``jnp.mean``."""
    shares: Shares = Global()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power < 1:
            raise ValueError(f"power must be at least 1 (1 is the sum), got {shown(self.power)}")

    def parts(self) -> tuple[Scorer, Placement]:
        return SecondReading(power=self.power, group=self.group), Evict(shares=self.shares)
