"""LeanKV (arXiv 2412.03131; version 3: DiffKV): significance decides between high precision, low precision, nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.moves import GONE, RAW, Held
from jaxkv.cache.quantised import HIGH, LOW, Tiers, num_blocks
from jaxkv.compression.budget import Budget, Unlimited
from jaxkv.compression.placement import Goal, Step, TierPolicy, most_blocks, with_formats
from jaxkv.policies.calibrated import GENERAL, Thresholds, thresholds_for
from pallas_kernels.paged_attention import Significance

if TYPE_CHECKING:
    from models import LlamaConfig

UNLIMITED = Unlimited()
QUERIES = 64
"""Last queries of the prompt that significance averages over, whatever the window."""
DOUBLINGS = 24
"""The thresholds are raised at most 2**24-fold."""


@dataclass(frozen=True, kw_only=True)
class LeanKV(TierPolicy):
    """A KV's significance is the mean attention that later queries pay it, of its query heads the highest.

    Below ``low_threshold / N`` a prompt's KV goes, below ``high_threshold / N`` it is kept in the low tier, else in the
    high one (section 4; ``N`` tokens in the text). A decode step takes one of four actions in each head (the authors'
    code; see ``step``). With a budget the thresholds are raised, both by one factor, until the blocks fit.
    """

    budget: Budget = UNLIMITED
    high_threshold: float | None = None
    """None: that which was calibrated for the model, where ``for_model`` is told of one (``policies.calibrated``)."""
    low_threshold: float | None = None
    """None: likewise, and no higher than the other."""
    protected_window: int = 64
    by_position: bool = False
    """Compare with ``threshold / (position + 1)`` in place of ``threshold / N``, as the paper's section 4 does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks:
            raise ValueError(f"leankv protects no sinks, got sinks={self.sinks}; leave it out, or take mixed or auto")
        high, low = self.thresholds
        if not 0 <= low <= high:
            raise ValueError(
                "thresholds must satisfy 0 <= low_threshold <= high_threshold, got "
                f"low_threshold={low}, high_threshold={high}"
            )

    @classmethod
    def named(cls, **settings) -> LeanKV:
        """As the constructor, with formats by their names: ``high="K8V4"``."""
        return cls(**with_formats(settings))

    @property
    def thresholds(self) -> Thresholds:
        """Those that apply."""
        return self._filled(GENERAL)

    def for_model(self, model: LlamaConfig) -> LeanKV:
        high, low = self._filled(thresholds_for(model))
        return replace(self, high_threshold=high, low_threshold=low)

    def _filled(self, calibrated: Thresholds) -> Thresholds:
        high = calibrated.high if self.high_threshold is None else self.high_threshold
        return Thresholds(high, min(calibrated.low, high) if self.low_threshold is None else self.low_threshold)

    @property
    def quantises_decoding(self) -> bool:
        return True

    @property
    def observed_queries(self) -> int | None:
        return QUERIES

    @property
    def observes_decoding(self) -> bool:
        return True

    def of_prompt(self, mass: Array, held: Array) -> Array:
        return mass.max(-2)

    def of_fewer(self, scores: Array, positions: Array, num_tokens: Array, observed: Array) -> Array:
        # The mean over those that were observed is kept, and weighs as much as one over ``QUERIES``. An exact ``since``
        # would instead put all that came before the prompt within the window, where nothing can be given up.
        age = num_tokens[None, :, None, None] - positions
        seen = jnp.minimum(age, observed[None, :, None, None])
        return scores * (jnp.minimum(age, QUERIES) / jnp.maximum(seen, 1))

    def since(self, positions: Array, num_tokens: Array) -> Array:
        return jnp.maximum(positions, num_tokens[None, :, None, None] - QUERIES)

    def assign(self, held: Held, tiers: Tiers) -> Goal:
        tokens = held.num_tokens[None, :, None, None]
        since = jnp.where(held.home == RAW, self.since(held.positions, held.num_tokens), held.positions)
        mean = held.scores / jnp.maximum(tokens - since, 1)
        base = jnp.where(held.home == RAW, held.positions, since) + 1 if self.by_position else tokens
        relative = mean * base
        exists = held.home != GONE
        # No quantised KV's stored position lies further back than the queries that were averaged over.
        clamped = (held.home != RAW) & (self.protected_window >= QUERIES)
        recent = exists & (held.positions >= tokens - self.protected_window + clamped)

        def home(factor: Array) -> Array:
            high, low = self._raised(factor)
            worth = jnp.where(relative >= high, HIGH, jnp.where(relative >= low, LOW, GONE))
            worth = jnp.maximum(jnp.where(recent, HIGH, worth), jnp.where(held.home == LOW, LOW, HIGH))
            return jnp.where(exists, worth, GONE)  # nothing is promoted

        most = most_blocks(self.budget, held, tiers)
        goal = home(_least_factor(lambda factor: _blocks(home(factor), tiers) <= most))
        return Goal(goal, since, _worth(held.scores, since, tokens, self.protected_window))

    def _raised(self, factor: Array) -> tuple[Array, Array]:
        """Both thresholds times a factor. A high one of 0 rises from there as one of 1 does from 1; a low one of 0
        follows the high one's rise at a fiftieth."""
        high, low = self.thresholds
        least = low * factor if low else (factor - 1) * (high or 1.0) / 50
        most = high * factor if high else factor - 1
        return jnp.maximum(most, least), jnp.asarray(least)

    def step(self, tiers: Tiers, position: Array) -> Step:
        """One of four actions in each head, by the KV of each tier that is worth least (the authors' code):

        1. the high tier's is below the low threshold and the lower of the two: the new token overwrites it;
        2. it is below the high threshold, and the low tier's below the low one: it is requantised over that one;
        3. it is below the high threshold: it is requantised into a new low slot;
        4. else, or within the window, the new token is appended.
        """
        high_count, low_count = tiers.lengths[..., HIGH], tiers.lengths[..., LOW]
        high, low = tiers.weakest.value[..., HIGH], tiers.weakest.value[..., LOW]
        tokens = jnp.maximum(position, 1)[None, :, None]
        high_bound, low_bound = (threshold / tokens for threshold in self.thresholds)
        full = high_count + low_count + 1 > self.protected_window
        overwrites = full & (high < low_bound) & (high < low)
        lowers = full & ~overwrites & (high < high_bound)
        replaces = lowers & (low < low_bound)
        appends = ~overwrites & ~lowers
        victim = tiers.weakest.index[..., HIGH]
        grown = jnp.stack([high_count + appends, low_count + (lowers & ~replaces)], axis=-1)
        return Step(
            lengths=grown,
            new=jnp.where(appends, high_count, victim),
            lowered=victim,
            to=jnp.where(lowers, jnp.where(replaces, tiers.weakest.index[..., LOW], low_count), -1),
        )

    @property
    def significance(self) -> Significance:
        return Significance(_most_of_group, partial(_worth, window=self.protected_window))


def _most_of_group(probability: Array) -> Array:
    return probability.max(-2)


def _worth(scores: Array, since: Array, position: Array, window: int) -> Array:
    """Mean attention to each KV by the time of a token's position; infinite within the window."""
    age = position - since
    return jnp.where(age >= window, scores / jnp.maximum(age, 1), jnp.inf)


def _blocks(home: Array, tiers: Tiers) -> Array:
    counts = jnp.stack([jnp.sum(home == tier, axis=-1) for tier in (HIGH, LOW)], axis=-1)
    return jnp.sum(num_blocks(counts, tiers.tokens))


def _least_factor(fits: Callable[[Array], Array]) -> Array:
    """The least factor, at least 1, at which the blocks fit, found by bisection of its logarithm."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        tight, loose = bounds
        middle = (tight + loose) / 2
        good = fits(jnp.exp2(middle))
        return jnp.where(good, tight, middle), jnp.where(good, middle, loose)

    _, found = lax.fori_loop(0, DOUBLINGS, halve, (jnp.float32(0.0), jnp.float32(DOUBLINGS)))
    return jnp.where(fits(jnp.float32(1.0)), 1.0, jnp.exp2(found))
