"""KV-Compress (arXiv 2410.00161): the last prompt queries' attention, squared, pooled, summed over the query group."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.checks import shown
from jaxkv.compression.budget import MOST
from jaxkv.compression.evict import Evict
from jaxkv.compression.observation import AllQueries, LastQueries, Observation
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.shares import Global, Shares


def l2(probability: Array) -> Array:
    """Squared attention (equation 8): the paper's choice."""
    return probability * probability


def l1(probability: Array) -> Array:
    """Plain attention."""
    return probability


@dataclass(frozen=True, kw_only=True)
class NormedAttention(Scorer):
    """A norm of the attention over the observed queries; see ``KVCompress``."""

    queries: Observation
    norm: Callable[[Array], Array] = l2
    group: Callable[..., Array] = jnp.sum
    pool: int = 7
    continual: bool = True

    @property
    def observes(self) -> Observation:
        return self.queries

    @property
    def observes_decoding(self) -> bool:
        return self.continual

    def weigh(self, probability: Array) -> Array:
        return self.norm(probability)

    def score(self, mass: Array, held: Array) -> Array:
        if self.pool > 1:
            mass = jnp.where(held[..., None, :], mass, -jnp.inf)
            window = (1,) * (mass.ndim - 1) + (self.pool,)
            mass = lax.reduce_window(mass, -jnp.inf, lax.max, window, (1,) * mass.ndim, "SAME")
        return jnp.where(held, self.group(mass, axis=-2), 0.0)

    def score_decoded(self, probability: Array) -> Array:
        return self.group(self.norm(probability), axis=-2)


@dataclass(frozen=True, kw_only=True)
class KVCompress(Method):
    """KVC-w, or with ``window=None`` KVC-full (section 3 and table 2 of the paper).

    Squares before summing over the queries, and pools each query head before joining the group, as the authors' code
    does; the paper's equations read as if the group came first.
    """

    window: int | None = 16
    """Last queries of the prompt that are observed; None: all. docs/evaluation.md says what to choose when."""
    norm: Callable[[Array], Array] = l2
    """What a probability counts for: ``l2`` or ``l1``."""
    group: Callable[..., Array] = jnp.sum
    """How the query heads of a KV head are joined: ``jnp.sum``, ``jnp.mean`` or ``jnp.max``."""
    pool: int = 7
    """Width of the max-pool along the keys; 1: none."""
    buffer: int = 0
    """A query tells nothing of keys less than so many tokens before it."""
    continual: bool = True
    """Decoded tokens add to the scores (equation 20). It costs nothing unless something is compressed again."""
    shares: Shares = Global()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and not 1 <= self.window <= MOST:
            given = shown(self.window)
            raise ValueError(f"window must be at least 1 query and below 2**31, or None for all, got {given}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and at least 1, got {shown(self.pool)}")
        if not 0 <= self.buffer <= self.protected_window:
            raise ValueError(
                f"buffer must lie between 0 and protected_window: {self.buffer=}, {self.protected_window=}; "
                "a KV must be observed before it can be evicted"
            )

    def parts(self) -> tuple[Scorer, Placement]:
        queries = AllQueries(buffer=self.buffer)
        if self.window is not None:
            queries = LastQueries(count=self.window, buffer=self.buffer)
        scorer = NormedAttention(
            queries=queries, norm=self.norm, group=self.group, pool=self.pool, continual=self.continual
        )
        return scorer, Evict(shares=self.shares)

    @classmethod
    def full(cls, **settings) -> "KVCompress":
        """KVC-full with the paper's settings: all queries, a buffer of 10, no pooling."""
        return cls(**{"window": None, "buffer": 10, "pool": 1, **settings})
