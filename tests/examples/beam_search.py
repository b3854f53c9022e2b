"""Beam search: beams are rows of one cache, and hold the blocks of what they have in common once."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import decode_step, fork, prefill, reorder


@partial(jax.jit, static_argnames=("model", "steps"), donate_argnames="cache")
def beam_search(model, cache, ids, *, steps):
    """The likeliest continuations of ``ids``, so many tokens each, with the sums of their log probabilities.

    Args:
      model: a ``models.Decoder``.
      cache: of as many rows as there are beams.
      ids: ``i32[tokens]``.
      steps: tokens of each beam.
    """
    beams, vocab = cache.num_tokens.shape[0], model.sizes.vocab_size
    is_first = jnp.arange(beams) == 0
    cache, logits = prefill(model, cache, jnp.tile(ids, (beams, 1)), is_first * len(ids))
    cache, granted = fork(cache, 0, jnp.arange(1, beams))
    scores, first = lax.top_k(jax.nn.log_softmax(logits[0]), beams)
    said = jnp.zeros((beams, steps), jnp.int32).at[:, 0].set(first)

    def step(i, state):
        cache, scores, said = state
        cache, logits = decode_step(model, cache, said[:, i - 1], jnp.ones(beams, bool))
        scores, best = lax.top_k((scores[:, None] + jax.nn.log_softmax(logits)).reshape(-1), beams)
        parent, token = best // vocab, best % vocab
        cache, granted = reorder(cache, parent)
        return cache, jnp.where(granted, scores, jnp.nan), said[parent].at[:, i].set(token)

    return lax.fori_loop(1, steps, step, (cache, jnp.where(granted, scores, jnp.nan), said))
