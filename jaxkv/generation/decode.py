"""From a cache to tokens: pure functions, to be called inside a jit of your own. Donate the cache at its boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.sharing import own
from jaxkv.cache.state import PagedCache
from jaxkv.compression.placement import Claim, claim_raw
from jaxkv.compression.policy import Policy
from jaxkv.generation.compress import check_blocks, compress, compress_again
from jaxkv.generation.passes import begin_step
from jaxkv.generation.prefill import prefill
from jaxkv.generation.sampling import Chosen, Sampler, choose
from models.interface import Decoder
from pallas_kernels.settings import any_ranks

Choose = Callable[[Array, Array], Array]
"""Logits ``f32[batch, vocab]`` and positions ``i32[batch]`` to tokens ``i32[batch]``."""


@any_ranks
def decode_step(
    model: Decoder, cache: PagedCache, tokens: Array, active: Array, policy: Policy | None = None
) -> tuple[PagedCache, Array]:
    """Caches one token a sequence and gives the logits of the next.

    Args:
      model: the model.
      cache: donated.
      tokens: ``i32[batch]``.
      active: ``bool[batch]``; the other rows stay as they are.
      policy: what quantises the token, or whose scores to add to; None: it is cached unquantised, and no more.

    Returns:
      The cache and ``f32[batch, vocab]``. Where the pool can't serve all active rows, the cache stays as it was and
      the logits are NaN: ask ``room_to_step`` first.

    Raises:
      ValueError: a cache whose blocks aren't those of the policy.
    """
    cache, owned = _owned(cache, active, policy)
    cache, logits = _step(model, cache, tokens.astype(jnp.int32), active & owned, policy)
    return cache, jnp.where(owned, logits, jnp.nan)


def _step(
    model: Decoder, cache: PagedCache, tokens: Array, active: Array, policy: Policy | None
) -> tuple[PagedCache, Array]:
    step = begin_step(cache, _claim(cache, active, policy), active, policy)
    state, hidden = model(tokens[:, None], cache.num_tokens[:, None], step.attend, step.state)
    return step.end(state), jnp.where(step.granted, model.logits(hidden[:, 0]), jnp.nan)


def _owned(cache: PagedCache, active: Array, policy: Policy | None) -> tuple[PagedCache, Array]:
    """The cache, with copies for rows whose old KVs a policy changes in decoding, and ``bool[]``: there was room."""
    if policy is None or not policy.acts_in_decoding:
        return cache, jnp.bool_(True)
    cache, owned = own(cache, active)
    return cache, jnp.all(owned | ~active)


@any_ranks
def room_to_step(cache: PagedCache, active: Array, policy: Policy | None = None) -> Array:
    """``bool[]``: whether blocks and table rows suffice for a decode step of the active rows, ``bool[batch]``.

    Where the policy quantises what it decodes, nothing of these rows may have stayed unquantised; where it acts in
    decoding at all, blocks must be free for copies of what they share.
    """
    cache, owned = _owned(cache, active, policy)
    return owned & _claim(cache, active, policy).granted


def _claim(cache: PagedCache, active: Array, policy: Policy | None) -> Claim:
    if policy is None:
        return claim_raw(cache, active)
    check_blocks(cache, policy)
    return policy.placement.claim(cache, active)


class Decoded(NamedTuple):
    """What ``decode`` leaves."""

    cache: PagedCache
    tokens: Array
    """``i32[batch, steps]``; those past a row's count are 0."""
    logprobs: Array
    """``f32[batch, steps]``: log probability of each token under the model."""
    counts: Array
    """``i32[batch]`` tokens made, a stop token included."""
    likeliest: Array
    """``i32[batch, steps, top]``: the likeliest tokens at each place, the likeliest first."""
    their_logprobs: Array
    """``f32[batch, steps, top]``."""
    active: Array
    """``bool[batch]`` rows that neither met a stop token nor their limit: with work left."""

    def likely(self, step: Array, chosen: Chosen) -> Decoded:
        """With the likeliest tokens of a step."""
        likeliest = self.likeliest.at[:, step].set(chosen.likeliest)
        return self._replace(
            likeliest=likeliest, their_logprobs=self.their_logprobs.at[:, step].set(chosen.their_logprobs)
        )

    @classmethod
    def none(cls, cache: PagedCache, active: Array, steps: int, top: int) -> Decoded:
        """Before the first step."""
        batch = active.shape[0]
        return cls(
            cache=cache,
            tokens=jnp.zeros((batch, steps), jnp.int32),
            logprobs=jnp.zeros((batch, steps), jnp.float32),
            counts=jnp.zeros(batch, jnp.int32),
            likeliest=jnp.zeros((batch, steps, top), jnp.int32),
            their_logprobs=jnp.zeros((batch, steps, top), jnp.float32),
            active=active,
        )


@any_ranks
def decode(
    model: Decoder,
    cache: PagedCache,
    tokens: Array,
    limits: Array,
    *,
    steps: int,
    sampler: Sampler | Choose | None = None,
    policy: Policy | None = None,
    stop_tokens: tuple[int, ...] = (),
    stops: Array | None = None,
    top: int = 0,
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
      stops: ``bool[batch]`` rows that they end; None: all.
      top: how many of the likeliest tokens to tell at each place; static.
    """
    may_stop = jnp.bool_(True) if stops is None else stops
    tokens, limits = tokens.astype(jnp.int32), limits.astype(jnp.int32)
    cache, owned = _owned(cache, limits > 0, policy)

    def going(state: tuple[Array, Array, Decoded, Sampler]) -> Array:
        step, _, made, _ = state
        return owned & (step < steps) & jnp.any(made.active) & _claim(made.cache, made.active, policy).granted

    def once(state: tuple[Array, Array, Decoded, Sampler]) -> tuple[Array, Array, Decoded, Sampler]:
        step, last, made, sampler = state
        cache, logits = _step(model, made.cache, last, made.active, policy)
        chosen = choose(sampler, logits, cache.num_tokens, top)
        new, logprob = jnp.where(made.active, chosen.tokens, 0), jnp.where(made.active, chosen.logprobs, 0.0)
        sampler = sampler.after(new, made.active)
        counts = made.counts + made.active.astype(jnp.int32)
        active = made.active & (counts < limits) & ~(is_any(new, stop_tokens) & may_stop)
        cache = _compress_grown(cache, policy, made.active)  # also what ends here: it may only end its dispatch
        made = made._replace(
            cache=cache,
            tokens=made.tokens.at[:, step].set(new),
            logprobs=made.logprobs.at[:, step].set(logprob),
            counts=counts,
            active=active,
        ).likely(step, chosen)
        return step + 1, jnp.where(made.active, new, last), made, sampler

    start = jnp.int32(0), tokens, Decoded.none(cache, limits > 0, steps, top), Sampler.of(sampler)
    return lax.while_loop(going, once, start)[2]


def is_any(tokens: Array, stop_tokens: tuple[int, ...]) -> Array:
    """``bool`` like ``tokens``: which of them stop."""
    return jnp.isin(tokens, jnp.array(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros(tokens.shape, bool)


def _compress_grown(cache: PagedCache, policy: Policy | None, active: Array) -> PagedCache:
    """Compresses the rows whose token count is a multiple of ``compress_every``, whatever the dispatch or the batch."""
    if policy is None or policy.compress_every is None:
        return cache
    due = active & (cache.num_tokens % policy.compress_every == 0)
    return lax.cond(jnp.any(due), lambda c: compress_again(c, policy, due), lambda c: c, cache)


@any_ranks
def generate(
    model: Decoder,
    cache: PagedCache,
    tokens: Array,
    lengths: Array,
    *,
    max_tokens: int,
    policy: Policy | None = None,
    sampler: Sampler | Choose | None = None,
    stop_tokens: tuple[int, ...] = (),
    top: int = 0,
) -> Decoded:
    """From prompts to tokens in one program. The first token comes from the full cache, then it is compressed.

    Arguments as for ``prefill`` and ``decode``; ``max_tokens`` is static. Where the pool is too small for the prompts
    no token is made; where it runs dry, decoding stops early: ``active`` tells.

    Raises:
      ValueError: ``max_tokens`` below 1, or as ``decode_step``.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    cache, logits = prefill(model, cache, tokens, lengths, policy)
    sampler = Sampler.of(sampler)
    first, *told = choose(sampler, logits, cache.num_tokens, top)
    if policy is not None:
        cache = compress(cache, policy)
    fits = ~jnp.isnan(logits[:, 0]) & (lengths > 0)
    more = fits & ~is_any(first, stop_tokens)
    rest = decode(
        model,
        cache,
        first,
        jnp.where(more, max_tokens - 1, 0),
        steps=max(max_tokens - 1, 1),
        sampler=sampler.after(jnp.where(fits, first, 0), fits),
        policy=policy,
        stop_tokens=stop_tokens,
        top=top,
    )

    def joined(first: Array, rest: Array) -> Array:
        first = jnp.where(fits.reshape(-1, *[1] * (first.ndim - 1)), first, jnp.zeros((), first.dtype))
        return jnp.concatenate([first[:, None], rest], axis=1)[:, :max_tokens]

    logprobs, likeliest, their_logprobs = map(joined, told, (rest.logprobs, rest.likeliest, rest.their_logprobs))
    return Decoded(
        cache=rest.cache,
        tokens=joined(first, rest.tokens),
        logprobs=logprobs,
        likeliest=likeliest,
        their_logprobs=their_logprobs,
        counts=rest.counts + fits.astype(jnp.int32),
        active=rest.active | (~fits & (lengths > 0)),
    )
