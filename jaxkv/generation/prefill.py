"""Reading a prompt into the cache, chunk by chunk.

``prefill`` is the whole of it, in one program; a host that wants to show progress calls ``start_prompt``,
``prefill_chunk``, where a policy wants it ``reread_chunk``, and ``finish_prompt`` itself.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.sharing import own
from jaxkv.cache.state import PagedCache
from jaxkv.compression.policy import Policy
from jaxkv.generation.packing import Packing
from jaxkv.generation.passes import LookAhead, ReadChunk
from jaxkv.generation.prompt import PromptState, start_prompt
from jaxkv.generation.scoring import score_prompt
from models.interface import Attend, Decoder, State
from pallas_kernels.settings import any_ranks

CHUNK = 512
"""Tokens of a prompt that go through the model at once."""


@any_ranks
def prefill(
    model: Decoder,
    cache: PagedCache,
    tokens: Array,
    lengths: Array,
    policy: Policy | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[PagedCache, Array]:
    """Reads prompts into the cache, after what each sequence already holds, and scores their KVs for the policy.

    Args:
      model: the model.
      cache: donated; its batch is that of the prompts.
      tokens: ``i32[batch, length]``, padded at the end.
      lengths: ``i32[batch]`` real tokens of each row, at most ``length``; 0 leaves a row as it is.
      policy: whose scores to record; None records none.
      chunk: tokens that go through the model at once; static. The work follows the longest prompt, not ``length``.

    Returns:
      The cache and the logits of each row's last token, ``f32[batch, vocab]``. Where the pool or a table row is too
      small for a chunk, nothing of it or what follows is written and the logits of all rows are NaN; so they are where
      a length is none of these, or a real token none of the model's, and then nothing at all is written.

    Raises:
      ValueError: arguments whose shapes don't belong together, or that aren't whole numbers.
    """
    _check_prompts(cache, tokens, lengths, chunk)
    length = tokens.shape[1]
    chunk = min(chunk, length)
    sound = _are_sound(tokens, lengths, model.sizes.vocab_size)
    lengths = jnp.where(sound, lengths, 0).astype(jnp.int32)
    tokens = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, -length % chunk)))
    prompt = replace(start_prompt(model, cache, lengths, policy), granted=sound)

    def part(i: Array) -> tuple[Array, Array]:
        ids = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        return ids, jnp.clip(lengths - i * chunk, 0, chunk)

    def read(i: Array, state: tuple[PagedCache, PromptState]) -> tuple[PagedCache, PromptState]:
        return prefill_chunk(model, *state, *part(i), policy)

    chunks = -(-jnp.max(lengths) // chunk)
    cache, prompt = lax.fori_loop(0, chunks, read, (cache, prompt))
    if policy is not None and policy.scorer.observes.rereads:

        def reread(i: Array, prompt: PromptState) -> PromptState:
            return reread_chunk(model, cache, prompt, *part(i), policy)

        prompt = lax.fori_loop(0, chunks, reread, prompt)
    return finish_prompt(model, cache, prompt, policy)


def _check_prompts(cache: PagedCache, tokens: Array, lengths: Array, chunk: int) -> None:
    batch = cache.num_tokens.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1 or lengths.shape != (batch,) or chunk < 1:
        raise ValueError(
            f"for a cache of {batch} sequences expected tokens [{batch}, length] of at least one column, lengths "
            f"[{batch}] and chunk >= 1, got tokens {list(tokens.shape)}, lengths {list(lengths.shape)} and {chunk=}"
        )
    if not all(jnp.issubdtype(each.dtype, jnp.integer) for each in (tokens, lengths)):
        raise ValueError(f"tokens and lengths must be whole numbers, got {tokens.dtype} and {lengths.dtype}")


def _are_sound(tokens: Array, lengths: Array, vocab: int) -> Array:
    """``bool[]``: whether all lengths are of rows that are so long, and all real tokens in the vocabulary."""
    # Compared before they are cut to 32 bits.
    tokens, lengths = (each.astype(jnp.int64 if each.dtype.itemsize > 4 else jnp.int32) for each in (tokens, lengths))
    real = jnp.arange(tokens.shape[1], dtype=lengths.dtype) < lengths[:, None]
    known = (tokens >= 0) & (tokens < vocab) | ~real
    return jnp.all((lengths >= 0) & (lengths <= tokens.shape[1])) & jnp.all(known)


def prefill_chunk(
    model: Decoder,
    cache: PagedCache,
    prompt: PromptState,
    tokens: Array,
    counts: Array,
    policy: Policy | None,
    *,
    length: int | None = None,
) -> tuple[PagedCache, PromptState]:
    """Reads one chunk of each prompt. Both states are donated.

    Args:
      model: the model.
      cache: of the prompts' rows.
      prompt: what is known of them so far.
      tokens: ``i32[batch, chunk]``, of which the first ``i32[batch]`` counts are real; with a length ``i32[1, chunk]``,
        in which the real ones of all prompts lie one after the other.
      counts: tokens of each prompt in it.
      policy: whose scores to record.
      length: tokens of a prompt at most; static.
    """
    chunk = ReadChunk(model, cache, prompt, length or tokens.shape[1], counts, policy)
    packing = None if length is None else Packing(counts, tokens.shape[1], length)
    state, hidden = _run(model, tokens, chunk.positions, chunk.attend, chunk.state, packing)
    return chunk.end(state, hidden)


def reread_chunk(
    model: Decoder,
    cache: PagedCache,
    prompt: PromptState,
    tokens: Array,
    counts: Array,
    policy: Policy,
    *,
    length: int | None = None,
) -> PromptState:
    """Reads a chunk as if it followed the prompt, only to see what it attends to: nothing of it is cached.

    Arguments as for ``prefill_chunk``.
    """
    packing = None if length is None else Packing(counts, tokens.shape[1], length)
    shape = counts.shape[0], length or tokens.shape[1]
    place = jnp.arange(shape[1], dtype=jnp.int32)
    rows = jnp.where((place < counts[:, None]) & prompt.granted, place, -1)
    look = LookAhead(cache, shape, fresh=prompt.fresh, mass=prompt.mass, rows=rows, policy=policy)
    mass, _ = _run(model, tokens, look.positions, look.attend, look.state, packing)
    return replace(prompt, mass=mass)


def _run(
    model: Decoder, tokens: Array, positions: Array, attend: Attend[State], state: State, packing: Packing | None
) -> tuple[State, Array]:
    """The state and what the model makes of each row's tokens, ``[batch, length, hidden]``."""
    if packing is None:
        return model(tokens, positions, attend, state)
    state, hidden = model(tokens, packing.pack(positions), packing.attend(attend), state)
    return state, packing.unpack(hidden)


@any_ranks
def look_ahead(model: Decoder, cache: PagedCache, tokens: Array) -> Array:
    """What the model makes of tokens that would follow, ``[batch, length, hidden]``; the cache stays as it is.

    ``tokens`` is ``i32[batch, length]``; what a row has past its real tokens changes nothing before it. A cache of one
    sequence serves any number of rows, each a continuation of its own.
    """
    look = LookAhead(cache, tokens.shape)
    return model(tokens, look.positions, look.attend, look.state)[1]


def finish_prompt(
    model: Decoder, cache: PagedCache, prompt: PromptState, policy: Policy | None
) -> tuple[PagedCache, Array]:
    """After the last chunk: scores from the observed attention and the KVs, and the logits of the last tokens."""
    logits, granted = model.logits(prompt.hidden), prompt.granted
    if policy is not None:  # scores are the row's own, also of KVs that it shares
        cache, owned = own(cache, prompt.lengths > 0)
        granted &= jnp.all(owned | (prompt.lengths == 0))
    return score_prompt(model, cache, prompt, policy), jnp.where(granted, logits, jnp.nan)
