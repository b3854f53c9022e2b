"""From attention, keys and values to the scores of a prompt's KVs."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.contents import Contents, contents, readable, unquantised, with_scores
from jaxkv.cache.home import RAW
from jaxkv.cache.raw import NULL_BLOCK
from jaxkv.cache.state import PagedCache
from jaxkv.compression.observation import ExpectedQueries, LastQueries
from jaxkv.compression.policy import Policy
from jaxkv.generation.prompt import PromptState, rotary
from models.interface import Decoder
from pallas_kernels.pool_values import read_rows


def score_prompt(model: Decoder, cache: PagedCache, prompt: PromptState, policy: Policy | None) -> PagedCache:
    """The cache with scores from attention and KVs: of a prompt, or of a part of one that is read in parts.

    What the last queries observed, or what others are expected to, replaces the scores that there are; what all queries
    did, or a second reading, adds to them. What KVs tell by themselves is left to ``compress``, which ranks them.
    """
    if policy is None or policy.scorer.scores_kvs_alone:
        return cache
    scorer, observes = policy.scorer, policy.scorer.observes
    if not (observes.watches or isinstance(observes, ExpectedQueries) or scorer.reads_kvs):
        return cache
    quantised, cache = cache.quantised, unquantised(cache) if prompt.fresh else cache
    now = contents(cache)
    scores, positions = _scores(model, cache, now, prompt, policy), now.positions
    if observes.adds_up:
        scores += now.scores
    elif isinstance(observes, LastQueries):
        seen = jnp.minimum(prompt.lengths, observes.count)
        scores, positions = policy.placement.rescored(scores, positions, cache.num_tokens, seen)
    reads = prompt.lengths > 0
    of_row = reads[:, None, None]
    scores, positions = jnp.where(of_row, scores, now.scores), jnp.where(of_row, positions, now.positions)
    cache = with_scores(cache, scores, positions, reads)
    return PagedCache(
        raw=cache.raw,
        quantised=quantised if prompt.fresh else cache.quantised,
        num_tokens=cache.num_tokens,
    )


def score_unquantised(cache: PagedCache, policy: Policy) -> PagedCache:
    """The cache with the scores that unquantised KVs tell by themselves; quantised ones keep what they had before."""
    now = contents(cache)
    of_all = _score_kvs(cache, now, policy, now.scores)
    scores = jnp.where(now.home == RAW, of_all, now.scores)
    return with_scores(cache, scores, now.positions, jnp.ones(cache.num_tokens.shape, bool))


def _scores(model: Decoder, cache: PagedCache, now: Contents, prompt: PromptState, policy: Policy) -> Array:
    """``f32`` like ``now.scores``, of what this prompt alone tells; 0 where there is no KV."""
    scorer, held = policy.scorer, now.held
    layers, batch, kv_heads, _ = held.shape
    scores = jnp.zeros(held.shape, jnp.float32)
    if prompt.queries is not None and isinstance(scorer.observes, ExpectedQueries):
        moments, count = prompt.queries, scorer.observes.count
        following, rotation = cache.num_tokens[:, None] + jnp.arange(count, dtype=jnp.int32), rotary(model).rotation

        def expected(layer: Array) -> Array:
            keys, _, positions = kvs_of(cache, now, layer)
            seen = held[layer] & (positions >= policy.sinks)
            return moments.attention(layer, keys, seen, rotation(layer, following))

        scores = scorer.score(lax.map(expected, jnp.arange(layers, dtype=jnp.int32)), held)
    elif prompt.mass is not None:
        scores = scorer.score(prompt.mass.reshape(layers, batch, kv_heads, -1, cache.capacity), held)
    if scorer.reads_kvs:
        scores = _score_kvs(cache, now, policy, scores)
    return jnp.where(held, scores, 0.0)


def _score_kvs(cache: PagedCache, now: Contents, policy: Policy, scores: Array) -> Array:
    """What the KVs make of scores; a layer at a time: what is copied out of the pool is one layer's."""

    scorer = policy.scorer.of_shard(cache.shards)

    def of_layer(layer: Array) -> Array:
        return scorer.score_kvs(scores[layer], *kvs_of(cache, now, layer), now.held[layer], layer)

    return lax.map(of_layer, jnp.arange(now.held.shape[0], dtype=jnp.int32))


def kvs_of(cache: PagedCache, now: Contents, layer: Array) -> tuple[Array, Array, Array]:
    """A layer's keys, values and positions as ``Scorer.score_kvs`` takes them."""
    (pool, table, _), positions = readable(cache, now, layer)
    held = now.held[layer]
    blocks = jnp.where(held[..., :: cache.raw.block_size], table, NULL_BLOCK)
    rows = read_rows(pool[blocks]).reshape(*held.shape, -1)
    keys, values = (_turned(part, cache) for part in jnp.split(jnp.where(held[..., None], rows, 0.0), 2, axis=-1))
    return keys, values, positions


def _turned(half: Array, cache: PagedCache) -> Array:
    """K or V as computed, of the half of a row that holds it, ``[..., half]``, 0 past ``head_dim``."""
    width = cache.raw.head_dim
    return half.at[..., :width].set(cache.raw.turned(half[..., :width])) if cache.raw.hadamard else half
