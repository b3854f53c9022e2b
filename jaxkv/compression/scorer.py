"""How attention, keys and values become a KV's score."""

from __future__ import annotations

from dataclasses import dataclass

from jax import Array

from jaxkv.cache.shards import HeadShards
from jaxkv.compression.observation import Nothing, Observation


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Base of all scorers: override the verbs that the method has something to say to. Static to jit, so it is frozen
    and hashable. The lowest ``rank`` goes first."""

    @property
    def observes(self) -> Observation:
        """Whose attention to the prompt's KVs ``score`` is given."""
        return Nothing()

    @property
    def observes_decoding(self) -> bool:
        """Whether each decoded token's attention is added to the scores."""
        return False

    @property
    def ranks_decoded(self) -> bool:
        """Whether ``rank`` can order KVs that no prompt scored, so that a sequence can be compressed again."""
        return self.observes_decoding or self.scores_kvs_alone

    @property
    def settled(self) -> bool:
        """Whether what a prompt's KV is worth doesn't depend on what follows it, so that as much of it stays if it is
        compressed while the rest is still to be read."""
        return False

    @property
    def reads_kvs(self) -> bool:
        """Whether the method has a ``score_kvs`` of its own."""
        return type(self).score_kvs is not Scorer.score_kvs

    @property
    def never_asked(self) -> str | None:
        """A verb of its own that isn't called, since nothing is observed that it would be told; None: there is none."""
        mine = type(self)
        if not self.observes.watches and mine.score is not Scorer.score and not self.observes.expects:
            return "score"
        if not (self.observes.watches or self.observes_decoding) and mine.weigh is not Scorer.weigh:
            return "weigh"
        decodes = mine.observes_decoding is not Scorer.observes_decoding
        return "score_decoded" if mine.score_decoded is not Scorer.score_decoded and not decodes else None

    @property
    def scores_kvs_alone(self) -> bool:
        """Whether ``score_kvs`` is all there is to a score, so that what was decoded gets one when it is needed."""
        return self.settled and self.reads_kvs

    def weigh(self, probability: Array) -> Array:
        """What one attention probability counts for, elementwise."""
        return probability

    def score(self, mass: Array, held: Array) -> Array:
        """Scores of a prompt's KVs.

        Args:
          mass: ``f32[layers, batch, kv_heads, group, kvs]``, ``weigh`` summed over the observed queries; of
            ``ExpectedQueries`` their mean attention.
          held: ``bool[layers, batch, kv_heads, kvs]``: which of them are KVs.

        Returns:
          ``f32[layers, batch, kv_heads, kvs]``.
        """
        return mass.sum(-2)

    def score_kvs(
        self, scores: Array, keys: Array, values: Array, positions: Array, held: Array, layer: Array
    ) -> Array:
        """Scores of a prompt's KVs, from those of ``score`` and the KVs themselves, a layer at a time.

        Args:
          scores: ``f32[batch, kv_heads, kvs]``; 0 where nothing is observed.
          keys: ``f32[batch, kv_heads, kvs, half]``, after RoPE; 0 past ``head_dim``, and where nothing is held.
          values: like ``keys``.
          positions: ``i32[batch, kv_heads, kvs]``.
          held: ``bool`` like ``positions``.
          layer: ``i32[]``: whose KVs they are.

        Returns:
          Like ``scores``.
        """
        return scores

    def of_shard(self, shards: HeadShards) -> Scorer:
        """The scorer for one device's heads, where they are split over several and it holds something of each."""
        return self

    def score_decoded(self, probability: Array) -> Array:
        """What a decoded token adds to the scores: probabilities ``[..., group, kvs]`` -> ``[..., kvs]``."""
        return self.weigh(probability).sum(-2)

    def rank(self, scores: Array, positions: Array) -> Array:
        """The order of eviction, lowest first, from the accumulated scores and the positions; same shape."""
        return scores
