"""LeanKV's placement (arXiv 2412.03131; version 3: DiffKV): significance decides between two precisions and nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.contents import Contents
from jaxkv.cache.home import GONE, HIGH, LOW, RAW
from jaxkv.cache.moves import Goal
from jaxkv.cache.state import PagedCache
from jaxkv.cache.tables import HeadTables
from jaxkv.compression.placement import Claim, Step, Worth
from jaxkv.compression.ranking import KEPT, sort_keys, take_cheapest
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.tiered import Tiered
from pallas_kernels.paged_attention import Significance as KernelSignificance
from pallas_kernels.paged_attention import Weakest

QUERIES = 64
"""Last queries of the prompt that significance averages over, whatever the window."""
DOUBLINGS = 24
"""The thresholds are raised at most 2**24-fold."""


@dataclass(frozen=True, kw_only=True)
class Significance(Tiered):
    """A KV's significance is the mean attention that later queries pay it, of its query heads the highest.

    Below ``low_threshold / N`` a prompt's KV goes, below ``high_threshold / N`` it is kept in the low tier, else in the
    high one (section 4; ``N`` tokens in the text). A decode step takes one of four actions in each head (the authors'
    code; see ``step``). With a budget the thresholds are raised, both by one factor, until the blocks fit, and
    what the thresholds themselves would have kept fills these.
    """

    high_threshold: float
    low_threshold: float
    window: int = 64
    """The policy's protected window."""
    by_position: bool = False
    """Compare with ``threshold / (position + 1)`` in place of ``threshold / N``, as the paper's section 4 does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low_threshold <= self.high_threshold:
            raise ValueError(
                "thresholds must satisfy 0 <= low_threshold <= high_threshold, got "
                f"low_threshold={self.low_threshold}, high_threshold={self.high_threshold}"
            )

    @property
    def quantises_decoding(self) -> bool:
        return True

    def ranks_decoded(self, scorer: Scorer) -> bool:
        return True

    def observes_decoding(self, scorer: Scorer) -> bool:
        """By the kernel's own significance, while the token is quantised."""
        return False

    def rescored(self, scores: Array, positions: Array, num_tokens: Array, observed: Array) -> tuple[Array, Array]:
        # The mean over those that were observed is kept, and weighs as much as one over ``QUERIES``. An exact ``since``
        # would instead put all that came before the prompt within the window, where nothing can be given up.
        age = num_tokens[None, :, None, None] - positions
        seen = jnp.minimum(age, observed[None, :, None, None])
        weight = jnp.minimum(age, QUERIES).astype(jnp.float32) / jnp.maximum(seen, 1).astype(jnp.float32)
        return scores * weight, _since(positions, num_tokens)

    def goal(self, cache: PagedCache, now: Contents, worth: Worth, room: Array) -> Goal:
        tokens = cache.num_tokens[None, :, None, None]
        since = jnp.where(now.home == RAW, _since(now.positions, cache.num_tokens), now.positions)
        mean = now.scores / jnp.maximum(tokens - since, 1).astype(jnp.float32)
        base = jnp.where(now.home == RAW, now.positions, since) + 1 if self.by_position else tokens
        relative = mean * base.astype(jnp.float32)
        # No quantised KV's stored position lies further back than the queries that were averaged over.
        clamped = (now.home != RAW) & (self.window >= QUERIES)
        recent = now.held & (now.positions >= tokens - self.window + clamped.astype(jnp.int32))

        def home(factor: Array) -> Array:
            high, low = self._raised(factor)
            ideal = jnp.where(relative >= high, HIGH, jnp.where(relative >= low, LOW, GONE))
            best = jnp.where(now.home == LOW, LOW, HIGH)  # nothing is promoted
            return jnp.where(now.held, jnp.maximum(jnp.where(recent, HIGH, ideal), best), GONE)

        tables, most = cache.tiers.tables, self.room_in_tables(cache, room)
        wanted, rises = home(jnp.float32(1.0)), now.held & (now.home != LOW)

        def within_budget() -> Array:
            factor = _least_factor(lambda factor: _blocks(home(factor), tables, rises) <= most)
            return _filled(home(factor), wanted != GONE, rises, relative, tables)

        goal = lax.cond(_blocks(wanted, tables) <= most, lambda: wanted, within_budget)
        value = _worth(now.scores, since, tokens, self.window)
        return Goal(home=goal, positions=since, worth=value, raw_stays=False)

    def _raised(self, factor: Array) -> tuple[Array, Array]:
        """Both thresholds times a factor. A high one of 0 rises from there as one of 1 does from 1; a low one of 0
        follows the high one's rise at a fiftieth."""
        high, low = self.high_threshold, self.low_threshold
        least = low * factor if low else (factor - 1) * (high or 1.0) / 50
        most = high * factor if high else factor - 1
        return jnp.maximum(most, least), jnp.asarray(least)

    def claim(self, cache: PagedCache, active: Array) -> Claim:
        """Room for the tokens in the high tier. Rows that hold anything unquantised get none: the step would not attend
        to that."""
        store, tables = cache.tiers, cache.tiers.tables
        step = self.step(tables.lengths, store.weakest, cache.num_tokens)
        ready = cache.within_capacity(cache.raw.lengths + step.lengths.sum(-1, dtype=jnp.int32), active)
        ready &= cache.shards.everywhere(~jnp.any(active[None, :, None] & (cache.raw.lengths > 0)))
        lengths = jnp.where((active & ready)[None, :, None, None], step.lengths, tables.lengths)
        tables, found = tables.grow(lengths, most=1)
        significance = KernelSignificance(_most_of_group, partial(_worth, window=self.window))
        return Claim(replace(cache, quantised=replace(store, tables=tables)), found & ready, step, significance)

    def step(self, lengths: Array, weakest: Weakest, position: Array) -> Step:
        """One of four actions in each head, by the KV of each tier that is worth least (the authors' code):

        1. the high tier's is below the low threshold and the lower of the two: the new token overwrites it;
        2. it is below the high threshold, and the low tier's below the low one: it is requantised over that one;
        3. it is below the high threshold: it is requantised into a new low slot;
        4. else, or within the window, the new token is appended.

        Args:
          lengths: ``i32[layers, batch, kv_heads, 2]`` KVs held in each tier.
          weakest: of each.
          position: ``i32[batch]`` of the new token.
        """
        high_count, low_count = lengths[..., HIGH], lengths[..., LOW]
        high, low = weakest.value[..., HIGH], weakest.value[..., LOW]
        tokens = jnp.maximum(position, 1)[None, :, None]
        high_bound, low_bound = (
            threshold / tokens.astype(jnp.float32) for threshold in (self.high_threshold, self.low_threshold)
        )
        full = high_count + low_count + 1 > self.window
        overwrites = full & (high < low_bound) & (high < low)
        lowers = full & ~overwrites & (high < high_bound)
        replaces = lowers & (low < low_bound)
        appends = ~overwrites & ~lowers
        victim = weakest.index[..., HIGH]
        grown = jnp.stack(
            [high_count + appends.astype(jnp.int32), low_count + (lowers & ~replaces).astype(jnp.int32)], axis=-1
        )
        return Step(
            lengths=grown,
            new=jnp.where(appends, high_count, victim),
            lowered=victim,
            to=jnp.where(lowers, jnp.where(replaces, weakest.index[..., LOW], low_count), -1),
        )


def _since(positions: Array, num_tokens: Array) -> Array:
    """What a KV's stored position becomes once a prompt's last queries have given it its score."""
    return jnp.maximum(positions, num_tokens[None, :, None, None] - QUERIES)


def _most_of_group(probability: Array) -> Array:
    return probability.max(-2)


def _worth(scores: Array, since: Array, position: Array, window: int) -> Array:
    """Mean attention to each KV by the time of a token's position; infinite within the window."""
    age = position - since
    return jnp.where(age >= window, scores / jnp.maximum(age, 1).astype(jnp.float32), jnp.inf)


def _blocks(home: Array, tables: HeadTables, rises: Array | None = None) -> Array:
    """Blocks that are needed on all devices, where ``rises`` is told once what it marks has filled the high ones."""
    counts = jnp.stack([jnp.sum(home == tier, axis=-1, dtype=jnp.int32) for tier in (HIGH, LOW)], axis=-1)
    if rises is not None:
        low = jnp.sum((home == LOW) & rises, axis=-1, dtype=jnp.int32)
        risen = jnp.minimum(-counts[..., HIGH] % tables.kvs_a_block[HIGH], low)
        counts += jnp.stack([risen, -risen], axis=-1)
    return tables.shards.sum(jnp.sum(tables.num_blocks(counts), dtype=jnp.int32))


def _filled(home: Array, stays: Array, rises: Array, relative: Array, tables: HeadTables) -> Array:
    """``home`` with each head's last block of either tier filled by the most significant of what is worse off and
    ``stays`` by the thresholds alone, since an empty slot saves nothing: first the high tier's, by what ``rises``."""
    keys = sort_keys(-relative)
    for tier, may in (HIGH, stays & rises), (LOW, stays):
        spare = -jnp.sum(home == tier, axis=-1, dtype=jnp.int32) % tables.kvs_a_block[tier]
        worse = jnp.where(may & (home > tier), keys, KEPT).reshape(-1, home.shape[-1])
        home = jnp.where(take_cheapest(worse, spare.reshape(-1)).reshape(home.shape), tier, home)
    return home


def _least_factor(fits: Callable[[Array], Array]) -> Array:
    """The least factor, at least 1, at which the blocks fit, found by bisection of its logarithm."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        tight, loose = bounds
        middle = (tight + loose) / 2
        good = fits(jnp.exp2(middle))
        return jnp.where(good, tight, middle), jnp.where(good, middle, loose)

    _, found = lax.fori_loop(0, DOUBLINGS, halve, (jnp.float32(0.0), jnp.float32(DOUBLINGS)))
    return jnp.where(fits(jnp.float32(1.0)), 1.0, jnp.exp2(found))
