"""Policies of somebody else's module, for ``module:Class``."""

from dataclasses import dataclass

from jax import Array

from jaxkv import Scorer
from jaxkv.compression import Evict, LastQueries, Method, Placement


@dataclass(frozen=True, kw_only=True)
class Mixture(Scorer):
    mix: float

    @property
    def observes(self):
        return LastQueries(count=16)

    def score(self, mass: Array, held: Array) -> Array:
        return mass.mean(-2) * self.mix + mass.max(-2) * (1 - self.mix)


@dataclass(frozen=True, kw_only=True)
class Own(Method):
    """A policy with a setting of its own."""

    mix: float = 0.5

    def parts(self) -> tuple[Scorer, Placement]:
        return Mixture(mix=self.mix), Evict()
