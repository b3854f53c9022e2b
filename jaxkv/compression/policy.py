"""What a policy has to say, and what it may leave as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax import Array

from jaxkv.compression.budget import MOST, Budget
from jaxkv.compression.shares import Global, Shares

if TYPE_CHECKING:
    from jaxkv.cache.state import CacheConfig
    from models import LlamaConfig

ALL_QUERIES = None
"""Value of ``observed_queries``: every query of the prompt."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies: how observed attention becomes a score, what is protected, how much stays.

    A policy is static to jit, so it is frozen and hashable. The mechanism evicts the KVs with the lowest ``rank``.
    """

    budget: Budget
    shares: Shares = Global()
    """How the heads of a sequence share the budget."""
    protected_window: int = 32
    """Newest tokens that are never evicted, the sampled but not yet cached one included."""
    sinks: int = 0
    """First tokens of the text that are never evicted."""
    compress_every: int | None = None
    """Compress again whenever a sequence's tokens are a multiple of this; None: once, after the prompt."""

    def __post_init__(self) -> None:
        if self.protected_window < 1:
            raise ValueError(f"protected_window must be at least 1, got {self.protected_window}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")
        if self.compress_every is not None and self.compress_every < 1:
            raise ValueError(f"compress_every must be at least 1 token, got {self.compress_every}")
        for name in ("protected_window", "sinks", "compress_every", "window"):
            if (getattr(self, name, None) or 0) > MOST:
                raise ValueError(f"{name} must be below 2**31, got {getattr(self, name)}")
        if self.compress_every is not None and not self.ranks_decoded:
            raise ValueError(
                f"compress_every={self.compress_every}: {type(self).__name__} doesn't rank what is decoded, so just "
                "that would be evicted; leave it out, or take kv-compress, h2o, streaming-llm or leankv"
            )

    def check(self, config: CacheConfig) -> None:
        """Raises ValueError where a cache of these sizes can't keep the budget, whatever the text."""
        self.budget.check(config, self.protected_window)

    def for_model(self, model: LlamaConfig) -> Policy:
        """The policy with what it leaves to the model filled in; ``jaxkv.LLM`` asks."""
        return self

    @property
    def observed_queries(self) -> int | None:
        """How many of the prompt's last queries are observed; 0: none, ``ALL_QUERIES``: all."""
        return 0

    @property
    def observed_buffer(self) -> int:
        """A query tells nothing of keys less than so many tokens before it."""
        return 0

    @property
    def observes_decoding(self) -> bool:
        """Whether each decoded token's attention is added to the scores."""
        return False

    @property
    def ranks_decoded(self) -> bool:
        """Whether ``rank`` can order KVs that no prompt scored, so that a sequence can be compressed again."""
        return self.observes_decoding

    @property
    def expected_queries(self) -> int:
        """At how many positions after the prompt to expect queries like its own, and have their attention in place of
        what is observed; ``sinks`` are left out on either side. 0: none."""
        return 0

    @property
    def rereads(self) -> bool:
        """Whether the prompt is read once more, as if it came again after itself, and its attention observed then."""
        return False

    @property
    def reads_kvs(self) -> bool:
        """Whether ``of_kvs`` has something to say."""
        return False

    def of_probability(self, probability: Array) -> Array:
        """What one attention probability counts for, elementwise."""
        return probability

    def of_prompt(self, mass: Array, held: Array) -> Array:
        """Scores of a prompt's KVs.

        Args:
          mass: ``f32[layers, batch, kv_heads, group, kvs]``, ``of_probability`` summed over the observed queries;
            of ``expected_queries`` their mean attention (``jaxkv.generation.query_moments``).
          held: ``bool[layers, batch, kv_heads, kvs]``: which of them are KVs.

        Returns:
          ``f32[layers, batch, kv_heads, kvs]``.
        """
        return mass.sum(-2)

    def of_kvs(self, scores: Array, keys: Array, values: Array, positions: Array, held: Array) -> Array:
        """Scores of a prompt's KVs, from those of ``of_prompt`` and the KVs themselves, a layer at a time.

        Args:
          scores: ``f32[batch, kv_heads, kvs]``; 0 where no query is observed or expected.
          keys: ``f32[batch, kv_heads, kvs, half]``, after RoPE; 0 past ``head_dim``, and where nothing is held.
          values: like ``keys``.
          positions: ``i32[batch, kv_heads, kvs]``.
          held: ``bool`` like ``positions``.

        Returns:
          Like ``scores``.
        """
        return scores

    def of_fewer(self, scores: Array, positions: Array, num_tokens: Array, observed: Array) -> Array:
        """Scores where a text was read on, from those that the new prompt alone gave; ``since`` comes after.

        Args:
          scores: ``f32[layers, batch, kv_heads, kvs]``.
          positions: ``i32`` like ``scores``.
          num_tokens: ``i32[batch]``: tokens of the text so far.
          observed: ``i32[batch]``: how many queries were observed, fewer than ``observed_queries`` of a short prompt.
        """
        return scores

    def since(self, positions: Array, num_tokens: Array) -> Array:
        """What a quantised KV's position becomes once a prompt's last queries have given it a new score."""
        return positions

    def of_decoding(self, probability: Array) -> Array:
        """What a decoded token adds to the scores: probabilities ``[..., group, kvs]`` -> ``[..., kvs]``."""
        return self.of_probability(probability).sum(-2)

    def rank(self, scores: Array, positions: Array) -> Array:
        """The order of eviction, lowest first, from the accumulated scores and the positions; same shape."""
        return scores

    def protects(self, positions: Array, num_tokens: Array) -> Array:
        """Which KVs must stay: ``i32[layers, batch, kv_heads, kvs]``, ``i32[batch]`` -> ``bool``."""
        last = num_tokens[None, :, None, None]  # position of the token that is sampled but not yet cached
        return (positions > last - self.protected_window) | (positions < self.sinks)
