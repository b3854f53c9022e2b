"""Compression: one mechanism for every policy, one sequence at a time."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache.contents import contents, with_scores
from jaxkv.cache.moves import move
from jaxkv.cache.sharing import can_own, own
from jaxkv.cache.state import PagedCache
from jaxkv.compression.policy import Policy
from jaxkv.generation.scoring import score_unquantised
from pallas_kernels.settings import any_ranks


@any_ranks
def compress(
    cache: PagedCache,
    policy: Policy,
    select: Array | None = None,
    *,
    tokens: Array | None = None,
    room: Array | None = None,
) -> PagedCache:
    """Takes from each sequence what the policy's budget doesn't leave room for.

    A policy with tiers needs free blocks to quantise to; a sequence for which there are too few stays as it is, and
    ``room_to_step`` then says so where it can't be decoded. One that shares blocks (``fork``) gets copies of its own
    first; where too few are free for those, it stays as it is, too.

    Args:
      cache: donated.
      policy: what decides which KVs stay, and where.
      select: ``bool[batch]`` the sequences to compress; None: all.
      tokens: ``i32[batch]`` whose budget to apply; None: those seen so far. A prompt that is read in parts gives the
        whole prompt's, so that each part leaves what the end will.
      room: ``i32[batch]`` blocks that each sequence may hold, of ``policy.placement.block_bytes`` each; None: as the
        budget says.

    Raises:
      ValueError: a cache whose blocks aren't those of the policy.
    """
    check_blocks(cache, policy)

    def one(row: Array, cache: PagedCache) -> PagedCache:
        which = row[None]
        part = cache.rows(which)
        budgeted = part.num_tokens[0] if tokens is None else tokens[row].astype(jnp.int32)
        left = jnp.asarray(policy.room(part, budgeted) if room is None else room[row], jnp.int32)
        due = policy.placement.due(part, left) & can_own(part)
        if select is not None:
            due &= select[row]

        def run(cache: PagedCache) -> PagedCache:
            part, _ = own(cache.rows(which), jnp.ones(1, bool))
            if policy.scorer.scores_kvs_alone:
                part = score_unquantised(part, policy)
            now = contents(part)
            goal = policy.placement.goal(part, now, policy.worth(part, now), left)
            return cache.with_rows(move(part, now, goal), which)

        return lax.cond(due, run, lambda cache: cache, cache)

    # One sequence at a time: what is ranked together is one sequence's, and temporaries stay those of one.
    return lax.fori_loop(0, cache.num_tokens.shape[0], one, cache)


def compress_again(
    cache: PagedCache, policy: Policy, select: Array | None = None, *, room: Array | None = None
) -> PagedCache:
    """As ``compress``, of sequences that have grown by ``compress_every`` tokens since they were compressed last."""
    if policy.observes_decoding:
        now = contents(cache)
        due = jnp.ones(cache.num_tokens.shape, bool) if select is None else select
        scores = jnp.where(due[:, None, None], policy.faded(now.scores, now.positions, cache.num_tokens), now.scores)
        cache = with_scores(cache, scores, now.positions, due)
    return compress(cache, policy, select, room=room)


def check_blocks(cache: PagedCache, policy: Policy) -> None:
    """Raises ValueError where the cache's quantised blocks aren't those that the policy needs."""
    needed = policy.placement.layout(cache.raw.head_dim)
    if needed != cache.layout:
        raise ValueError(
            f"this cache has {cache.layout or 'no quantised blocks'}, and {policy} needs {needed or 'none'}; give "
            "CacheConfig the layout of the policy's placement"
        )
