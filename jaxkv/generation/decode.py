"""Pure functions from prompt to tokens, to be called inside a jit of your own.

``prefill`` -> ``compress`` -> ``decode`` (or ``decode_step``), and ``generate``, which is all of them. The model is
any callable like ``models.Llama``: it hands each layer's queries, keys and values to an ``attend`` that writes them to
the cache and reads it. Donate the cache at the jit boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache import allocator
from jaxkv.cache.state import PagedCache, in_table_order, put_sequences, stamp_slots, take_sequences, to_slots
from jaxkv.compression import evict as eviction
from jaxkv.generation import passes as tier_steps
from jaxkv.generation.prefill import prefill
from jaxkv.generation.sampling import Greedy, Sampler, logprobs_of
from jaxkv.policies import Policy, TierPolicy
from pallas_kernels.block_writes import write_blocks
from pallas_kernels.paged_attention import RawKVs, paged_attention

if TYPE_CHECKING:
    from models import Llama


def compress(
    cache: PagedCache,
    policy: Policy,
    select: Array | None = None,
    *,
    tokens: Array | None = None,
    evict_blocks: Array | None = None,
) -> PagedCache:
    """Evicts from each sequence what the policy's budget doesn't leave room for.

    A policy with tiers needs free blocks to quantise to; a sequence for which there are too few stays as it is, and
    ``room_to_step`` then says so where it can't be decoded.

    Args:
      cache: donated.
      policy: what decides which KVs stay.
      select: ``bool[batch]`` the sequences to compress; None: all.
      tokens: ``i32[batch]`` whose budget to apply; None: those seen so far. A prompt that is read in parts gives the
        whole prompt's, so that each part leaves what the end will.
      evict_blocks: ``i32[batch]`` blocks to give up, whatever the budget says; None: as it says.

    Raises:
      ValueError: ``evict_blocks`` for a policy of quantised tiers.
    """
    if isinstance(policy, TierPolicy):
        if evict_blocks is not None:
            raise ValueError(f"{type(policy).__name__} has blocks of two precisions; give a budget, not evict_blocks")
        every = jnp.ones(cache.num_tokens.shape, bool)
        return _retier(
            cache, policy, every if select is None else select, cache.num_tokens if tokens is None else tokens
        )
    if evict_blocks is None:
        budgeted = cache if tokens is None else replace(cache, num_tokens=tokens)
        evict_blocks = policy.budget.evict_blocks(budgeted, policy.protected_window)
    if select is not None:
        evict_blocks = jnp.where(select, evict_blocks, 0)

    blocks = evict_blocks

    def compress_one(row: Array, cache: PagedCache) -> PagedCache:
        def run(cache: PagedCache) -> PagedCache:
            sequence = row[None]
            part = _evict(take_sequences(cache, sequence), policy, blocks[sequence])
            return put_sequences(cache, part, sequence)

        return lax.cond(blocks[row] > 0, run, lambda cache: cache, cache)

    # One sequence at a time: what is ranked together is one sequence's, and temporaries stay those of one.
    return lax.fori_loop(0, blocks.shape[0], compress_one, cache)


def _retier(cache: PagedCache, policy: TierPolicy, select: Array, tokens: Array) -> PagedCache:
    def compress_one(row: Array, cache: PagedCache) -> PagedCache:
        def run(cache: PagedCache) -> PagedCache:
            part = tier_steps.compress(take_sequences(cache, row[None]), policy, tokens[row])
            return put_sequences(cache, part, row[None])

        return lax.cond(select[row] & (cache.num_tokens[row] > 0), run, lambda cache: cache, cache)

    return lax.fori_loop(0, select.shape[0], compress_one, cache)


def _evict(cache: PagedCache, policy: Policy, evict_blocks: Array) -> PagedCache:
    """Evicts so many blocks, ``i32[batch]``, of each sequence."""
    table = cache.block_table, cache.lengths
    positions = in_table_order(cache.positions, *table, cache.block_size)
    scores = policy.rank(in_table_order(cache.scores, *table, cache.block_size), positions)
    held = jnp.arange(cache.capacity) < cache.lengths[..., None]
    evictable = held & ~policy.protects(positions, cache.num_tokens)
    # XLA for TPU takes minutes to compile what it would fuse across this line; on CPU the barrier is nothing.
    scores, evictable = lax.optimization_barrier((scores, evictable))
    return eviction.evict(cache, scores, evictable, evict_blocks, shares=policy.shares)


def decode_step(
    model: Llama, cache: PagedCache, tokens: Array, active: Array, policy: Policy | None = None
) -> tuple[PagedCache, Array]:
    """Caches one token a sequence and gives the logits of the next.

    Args:
      model: the model.
      cache: donated.
      tokens: ``i32[batch]``.
      active: ``bool[batch]``; the other rows stay as they are.
      policy: whose scores to add to, where it observes decoding.

    Returns:
      The cache and ``f32[batch, vocab]``. Where the pool can't serve all active rows, the cache stays as it was and
      the logits are NaN: ask ``room_to_step`` first.

    Raises:
      ValueError: a cache with quantised tiers, and a policy without.
    """
    if cache.tiers is not None:
        if not isinstance(policy, TierPolicy):
            raise ValueError(f"a cache with quantised tiers needs the policy that decides over them, got {policy}")
        return tier_steps.decode_step(model, cache, tokens, active, policy)
    starts, positions = cache.lengths, cache.num_tokens[:, None]
    cache, granted = allocator.grow(cache, starts + active[None, :, None], most=1)
    counts = (active & granted).astype(jnp.int32)
    cache = stamp_slots(cache, starts, positions, counts)
    lengths = jnp.where(counts[None, :, None] > 0, cache.lengths, 0)
    observer = policy if policy is not None and policy.observes_decoding else None

    def attend(
        state: tuple[Array, Array], layer: int | Array, query: Array, key: Array, value: Array
    ) -> tuple[tuple[Array, Array], Array]:
        pool, scores = state
        table, length = cache.block_table[layer], lengths[layer]
        pool = write_blocks(pool, key, value, table, starts[layer], counts)
        if observer is None:
            out, _ = paged_attention(query[:, 0], RawKVs(pool, table, length))
            return (pool, scores), out[:, None]
        out, mass = paged_attention(query[:, 0], RawKVs(pool, table, length), observe=observer.of_decoding)
        if observer.observed_buffer:
            key_positions = in_table_order(cache.positions, table, length, cache.block_size)
            mass = jnp.where(key_positions <= positions[..., None] - observer.observed_buffer, mass, 0.0)
        scores = to_slots(scores, table, length, in_table_order(scores, table, length, cache.block_size) + mass)
        return (pool, scores), out[:, None]

    (pool, scores), hidden = model(tokens[:, None], positions, attend, (cache.pool, cache.scores))
    cache = replace(cache, pool=pool, scores=scores, num_tokens=cache.num_tokens + counts)
    return cache, jnp.where(granted, model.logits(hidden[:, 0]), jnp.nan)


def room_to_step(cache: PagedCache, active: Array, policy: Policy | None = None) -> Array:
    """``bool[]``: whether blocks and table rows suffice for a decode step of the active rows, ``bool[batch]``.

    Where the policy quantises what it decodes, nothing of these rows may have stayed unquantised.
    """
    if cache.tiers is not None and isinstance(policy, TierPolicy):
        return tier_steps.room_to_step(cache, active, policy)
    return allocator.has_room(cache, cache.lengths + active[None, :, None])


class Decoded(NamedTuple):
    """What ``decode`` leaves."""

    cache: PagedCache
    tokens: Array
    """``i32[batch, steps]``; those past a row's count are 0."""
    logprobs: Array
    """``f32[batch, steps]``: log probability of each token under the model."""
    counts: Array
    """``i32[batch]`` tokens made, a stop token included."""
    active: Array
    """``bool[batch]`` rows that neither met a stop token nor their limit: with work left."""


def decode(
    model: Llama,
    cache: PagedCache,
    tokens: Array,
    limits: Array,
    *,
    steps: int,
    sampler: Sampler | None = None,
    policy: Policy | None = None,
    stop_tokens: tuple[int, ...] = (),
) -> Decoded:
    """Many decode steps in one dispatch, with allocation, and where the policy wants it compression, inside.

    Args:
      model: the model.
      cache: donated.
      tokens: ``i32[batch]`` each row's last token, sampled but not yet cached.
      limits: ``i32[batch]`` tokens to make at most; 0 leaves a row as it is.
      steps: most steps of this dispatch; static. It ends earlier where no row is active, or before a step that the
        pool can't serve.
      sampler: how to choose tokens; None: greedily.
      policy: what compresses sequences that have grown; static.
      stop_tokens: end a row; static.
    """
    sampler = Greedy() if sampler is None else sampler
    batch = tokens.shape[0]

    def going(state: tuple[Array, Array, Decoded]) -> Array:
        step, _, made = state
        return (step < steps) & jnp.any(made.active) & room_to_step(made.cache, made.active, policy)

    def once(state: tuple[Array, Array, Decoded]) -> tuple[Array, Array, Decoded]:
        step, last, made = state
        cache, logits = decode_step(model, made.cache, last, made.active, policy)
        new, logprob = _choose(sampler, logits, cache.num_tokens)
        new, logprob = jnp.where(made.active, new, 0), jnp.where(made.active, logprob, 0.0)
        counts = made.counts + made.active
        active = made.active & (counts < limits) & ~_is_any(new, stop_tokens)
        cache = _compress_grown(cache, policy, made.active)  # also what ends here: it may only end its dispatch
        made = Decoded(
            cache=cache,
            tokens=made.tokens.at[:, step].set(new),
            logprobs=made.logprobs.at[:, step].set(logprob),
            counts=counts,
            active=active,
        )
        return step + 1, jnp.where(made.active, new, last), made

    start = Decoded(
        cache=cache,
        tokens=jnp.zeros((batch, steps), jnp.int32),
        logprobs=jnp.zeros((batch, steps)),
        counts=jnp.zeros(batch, jnp.int32),
        active=limits > 0,
    )
    return lax.while_loop(going, once, (jnp.int32(0), tokens, start))[2]


def _choose(sampler: Callable[[Array, Array], Array], logits: Array, position: Array) -> tuple[Array, Array]:
    tokens = sampler(logits, position)
    return tokens, logprobs_of(logits, tokens)


def _is_any(tokens: Array, stop_tokens: tuple[int, ...]) -> Array:
    return jnp.isin(tokens, jnp.array(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros(tokens.shape, bool)


def _compress_grown(cache: PagedCache, policy: Policy | None, active: Array) -> PagedCache:
    """Compresses the rows whose token count is a multiple of ``compress_every``, whatever the dispatch or the batch."""
    if policy is None or policy.compress_every is None:
        return cache
    due = active & (cache.num_tokens % policy.compress_every == 0)
    return lax.cond(jnp.any(due), lambda c: compress(c, policy, due), lambda c: c, cache)


def generate(
    model: Llama,
    cache: PagedCache,
    tokens: Array,
    lengths: Array,
    *,
    max_tokens: int,
    policy: Policy | None = None,
    sampler: Sampler | None = None,
    stop_tokens: tuple[int, ...] = (),
) -> Decoded:
    """From prompts to tokens in one program. The first token comes from the full cache, then it is compressed.

    Arguments as for ``prefill`` and ``decode``; ``max_tokens`` is static. Where the pool is too small for the prompts
    no token is made; where it runs dry, decoding stops early: ``active`` tells.

    Raises:
      ValueError: ``max_tokens`` below 1, or as ``decode_step``.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    sampler = Greedy() if sampler is None else sampler
    cache, logits = prefill(model, cache, tokens, lengths, policy)
    first, logprob = _choose(sampler, logits, cache.num_tokens)
    if policy is not None:
        cache = compress(cache, policy)
    fits = ~jnp.isnan(logits[:, 0]) & (lengths > 0)
    more = fits & ~_is_any(first, stop_tokens)
    rest = decode(
        model,
        cache,
        first,
        jnp.where(more, max_tokens - 1, 0),
        steps=max(max_tokens - 1, 1),
        sampler=sampler,
        policy=policy,
        stop_tokens=stop_tokens,
    )
    return Decoded(
        cache=rest.cache,
        tokens=jnp.concatenate([jnp.where(fits, first, 0)[:, None], rest.tokens], axis=1)[:, :max_tokens],
        logprobs=jnp.concatenate([jnp.where(fits, logprob, 0.0)[:, None], rest.logprobs], axis=1)[:, :max_tokens],
        counts=rest.counts + fits,
        active=rest.active | (~fits & (lengths > 0)),
    )
