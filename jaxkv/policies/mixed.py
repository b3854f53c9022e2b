"""Any policy's ranking, with LeanKV's tiers: what ranks highest is kept at high precision, what comes next at low."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import Array

from jaxkv.cache.moves import GONE, RAW, Held
from jaxkv.cache.quantised import HIGH, LOW, Tiers
from jaxkv.compression.budget import Budget
from jaxkv.compression.placement import Goal, TierPolicy, most_blocks, with_formats
from jaxkv.compression.policy import Policy
from jaxkv.compression.ranking import KEPT, sort_keys, take_cheapest

TIER_SETTINGS = ("high", "low", "block_tokens", "high_share", "unquantised_window")


@dataclass(frozen=True, kw_only=True)
class Mixed(TierPolicy):
    """All heads of all layers compete for whole blocks of a byte budget, first for high ones and then for low ones.

    A block's price is the highest rank among the KVs that it would hold, as in KV-Compress (section 4), so what is
    allocated is also filled. Tokens decoded later are kept unquantised until they are compressed (``compress_every``),
    which takes a ranking by position, since decoding adds to no score.
    """

    scoring: Policy
    """What ranks and protects KVs; its own budget and shares mean nothing here."""
    protected_window: int = field(init=False)
    """That of ``scoring``."""
    sinks: int = field(init=False)
    """Those of ``scoring``."""
    high_share: float = 0.5
    """Part of the budget's blocks that are of the high tier; at least those of what is protected."""
    unquantised_window: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]
    """What is protected, sinks and the recent window, stays as it was computed, in unquantised blocks that the budget
    pays for; what has been quantised is not brought back."""

    def __post_init__(self) -> None:
        for name in ("protected_window", "sinks"):
            object.__setattr__(self, name, getattr(self.scoring, name))  # the one way into a frozen dataclass
        super().__post_init__()
        if not 0 <= self.high_share <= 1:
            raise ValueError(f"high_share is a part of the budget, from 0 to 1, got {self.high_share}")

    @classmethod
    def over(cls, scoring: Callable[..., Policy], *, budget: Budget, **settings) -> Mixed:
        """Tiers by the ranking that ``scoring`` makes of all settings that aren't the tiers' own.

        Formats are given by their names: ``high="K8V4"``.
        """
        own = with_formats({name: settings.pop(name) for name in TIER_SETTINGS if name in settings})
        ranking = scoring(budget=budget, **settings)
        return cls(budget=budget, scoring=ranking, compress_every=ranking.compress_every, **own)

    @property
    def protected_tokens(self) -> int:
        return self.protected_window - 1 + self.sinks  # the newest token isn't cached yet

    @property
    def observed_queries(self) -> int | None:
        return self.scoring.observed_queries

    @property
    def observed_buffer(self) -> int:
        return self.scoring.observed_buffer

    @property
    def expected_queries(self) -> int:
        return self.scoring.expected_queries

    @property
    def rereads(self) -> bool:
        return self.scoring.rereads

    @property
    def reads_kvs(self) -> bool:
        return self.scoring.reads_kvs

    @property
    def ranks_decoded(self) -> bool:
        """Scores stay as they are while tokens are decoded."""
        return self.scoring.ranks_decoded and not self.scoring.observes_decoding

    def of_kvs(self, scores: Array, keys: Array, values: Array, positions: Array, held: Array) -> Array:
        return self.scoring.of_kvs(scores, keys, values, positions, held)

    def of_probability(self, probability: Array) -> Array:
        return self.scoring.of_probability(probability)

    def of_prompt(self, mass: Array, held: Array) -> Array:
        return self.scoring.of_prompt(mass, held)

    def assign(self, held: Held, tiers: Tiers) -> Goal:
        exists = held.home != GONE
        protected = exists & self.scoring.protects(held.positions, held.num_tokens)
        stays = protected & (held.home == RAW) & self.unquantised_window
        exists &= ~stays
        protected &= ~stays
        rank = sort_keys(-self.scoring.rank(held.scores, held.positions))  # the highest first
        keys = jnp.where(exists, jnp.where(protected, jnp.iinfo(jnp.int32).min, rank), KEPT)
        rises = exists & (held.home != LOW)  # what is in the low tier already is not brought back

        high_tokens, low_tokens = (int(n) for n in tiers.tokens)
        most = most_blocks(self.budget, held, tiers, unquantised=stays)
        needed = jnp.sum(-(-(protected & rises).sum(-1) // high_tokens))
        high_blocks = jnp.clip(jnp.round(most * self.high_share).astype(jnp.int32), needed, jnp.maximum(most, needed))
        high = _best(jnp.where(rises, keys, KEPT), high_tokens, high_blocks)
        left = jnp.maximum(most - jnp.sum(-(-high.sum(-1) // high_tokens)), 0)
        low = _best(jnp.where(high, KEPT, keys), low_tokens, left)
        goal = jnp.where(stays, RAW, jnp.where(high, HIGH, jnp.where(low, LOW, GONE)))
        return Goal(goal, held.positions, jnp.full(held.scores.shape, jnp.inf))


def _best(keys: Array, tokens: int, count: Array) -> Array:
    """``bool`` like keys: the KVs that ``count`` blocks of a tier hold, the lowest keys of each head first.

    The heads get the blocks that are cheapest by their first key; a key of ``KEPT`` is no KV.
    """
    ascending = jnp.sort(keys, axis=-1)
    price = ascending[..., ::tokens]
    blocks = take_cheapest(price.reshape(1, -1), count[None]).reshape(price.shape).sum(-1, dtype=jnp.int32)
    kvs = keys.shape[-1]
    taken = take_cheapest(keys.reshape(-1, kvs), tokens * blocks.reshape(-1), ascending.reshape(-1, kvs))
    return taken.reshape(keys.shape)
