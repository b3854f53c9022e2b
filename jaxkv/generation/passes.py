"""Compression and decoding of a cache that has quantised tiers, by a policy that decides over them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkv.cache import allocator
from jaxkv.cache import moves as tiering
from jaxkv.cache import quantised as tiers
from jaxkv.cache.quantised import HIGH, LOW, Tiers
from jaxkv.cache.state import PagedCache, stamp_slots
from jaxkv.compression.placement import Step, TierPolicy
from pallas_kernels.block_writes import write_blocks
from pallas_kernels.paged_attention import RawKVs, TieredKVs, Weakest, paged_attention
from pallas_kernels.quantised_writes import lower_kvs, write_kvs

if TYPE_CHECKING:
    from models import Llama


def compress(cache: PagedCache, policy: TierPolicy, tokens: Array) -> PagedCache:
    """Decides anew where the KVs of a cache of one sequence live, by the budget of so many tokens, ``i32[]``.

    Where the blocks for it aren't free nothing changes: what was unquantised stays so.
    """
    now = replace(tiering.held(cache), whole=tokens[None])
    goal = policy.assign(now, cache.quantised)
    now = replace(now, positions=goal.positions)
    fits = tiering.fits(cache, goal.home)
    move = partial(tiering.move, keep_unquantised=policy.unquantised_window)
    return lax.cond(fits, lambda c: move(c, now, goal.home, goal.worth), lambda c: c, cache)


def room_to_step(cache: PagedCache, active: Array, policy: TierPolicy) -> Array:
    """As ``generation.room_to_step``."""
    step = policy.step(cache.quantised, cache.num_tokens)
    ready = _ready(cache, step, active)
    if step is None:
        return ready & allocator.has_room(cache, cache.lengths + active[None, :, None])
    lengths = jnp.where(active[None, :, None, None], step.lengths, cache.quantised.lengths)
    return ready & tiers.has_room(cache.quantised, lengths)


def _ready(cache: PagedCache, step: Step | None, active: Array) -> Array:
    """``bool[]``: whether the heads of active rows stay within their capacity.

    And where the step quantises, hold nothing unquantised: it would not attend to that.
    """
    if step is None:
        return tiering.within_capacity(cache, tiering.total(cache) + 1, active)
    within = tiering.within_capacity(cache, cache.lengths + step.lengths.sum(-1), active)
    return within & ~jnp.any(active[None, :, None] & (cache.lengths > 0))


class Compacted(NamedTuple):
    """Tiers that are ready for a decode step's new KVs."""

    tiers: Tiers
    blocks: Array
    """``i32[layers, batch, kv_heads]`` where each head's new KV goes; the null block for none."""
    offsets: Array
    granted: Array
    """``bool[]``: enough blocks were free."""


def compact(quantised: Tiers, step: Step, active: Array) -> Compacted:
    """Does what a policy has decided for all heads of all layers at once: plan, prefix sum, execute (section 5).

    What it needs of blocks is counted, handed out by rank, and then KVs are requantised in place. No block is freed.
    """
    select = active[None, :, None]
    quantised, granted = tiers.grow(quantised, jnp.where(select[..., None], step.lengths, quantised.lengths), most=1)
    acts = select & granted
    lowers = acts & (step.to >= 0)
    from_block, from_offset = tiers.slots_of(quantised, HIGH, step.lowered)
    to_block, to_offset = tiers.slots_of(quantised, LOW, jnp.maximum(step.to, 0))
    moves = jnp.where(lowers, from_block, 0), from_offset, jnp.where(lowers, to_block, 0), to_offset
    pool = lower_kvs(quantised.pool, *(part.reshape(-1) for part in moves), layout=quantised.layout)
    block, offset = tiers.slots_of(quantised, HIGH, step.new)
    return Compacted(replace(quantised, pool=pool), jnp.where(acts, block, 0), offset, granted)


def decode_step(
    model: Llama, cache: PagedCache, tokens: Array, active: Array, policy: TierPolicy
) -> tuple[PagedCache, Array]:
    """As ``generation.decode_step``. The policy's step comes first, then the new token is written, at the high tier's
    precision, and then it attends, to itself as it is stored, and scores are added to."""
    positions = cache.num_tokens
    step = policy.step(cache.quantised, positions)
    ready = _ready(cache, step, active)
    if step is None:
        return _unquantised_step(model, cache, tokens, active, ready)
    quantised, new_blocks, new_offsets, granted = compact(cache.quantised, step, active & ready)
    granted &= ready
    acts = active & granted
    seen = jnp.where(acts[None, :, None, None], quantised.lengths, 0)
    layout, kv_heads = quantised.layout, seen.shape[2]
    each_position = jnp.repeat(positions, kv_heads)

    def attend(
        state: tuple[Array, Weakest], layer: int | Array, query: Array, key: Array, value: Array
    ) -> tuple[tuple[Array, Weakest], Array]:
        pool, weakest = state
        key, value = key.reshape(-1, layout.head_dim), value.reshape(-1, layout.head_dim)
        blocks, offsets = new_blocks[layer].reshape(-1), new_offsets[layer].reshape(-1)
        pool = write_kvs(pool, key, value, each_position, blocks, offsets, layout)
        assert policy.significance is not None  # of a policy that has a step
        tiers = TieredKVs(pool=pool, block_table=quantised.block_table[layer], lengths=seen[layer], layout=layout)
        out, found = paged_attention(
            query[:, 0], None, tiers=tiers, observe=policy.significance, next_position=positions + 1
        )

        def put(old: Array, found: Array) -> Array:
            return old.at[layer].set(jnp.where(acts[:, None, None], found, old[layer]))

        return (found.pool, jax.tree.map(put, weakest, found.weakest)), out[:, None]

    (pool, weakest), hidden = model(tokens[:, None], positions[:, None], attend, (quantised.pool, quantised.weakest))
    quantised = replace(quantised, pool=pool, weakest=weakest)
    cache = replace(cache, tiers=quantised, num_tokens=positions + acts)
    return cache, jnp.where(granted, model.logits(hidden[:, 0]), jnp.nan)


def _unquantised_step(
    model: Llama, cache: PagedCache, tokens: Array, active: Array, ready: Array
) -> tuple[PagedCache, Array]:
    """The new token is cached unquantised; scores stay as they are."""
    starts, positions = cache.lengths, cache.num_tokens[:, None]
    cache, granted = allocator.grow(cache, starts + (active & ready)[None, :, None], most=1)
    granted &= ready
    counts = (active & granted).astype(jnp.int32)
    cache = stamp_slots(cache, starts, positions, counts)
    lengths = jnp.where(counts[None, :, None] > 0, cache.lengths, 0)
    quantised = cache.quantised
    seen = jnp.where(counts[None, :, None, None] > 0, quantised.lengths, 0)

    def attend(state: Array, layer: int | Array, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        pool = write_blocks(state, key, value, cache.block_table[layer], starts[layer], counts)
        raw = RawKVs(pool, cache.block_table[layer], lengths[layer])
        table = quantised.block_table[layer]
        tiers = TieredKVs(pool=quantised.pool, block_table=table, lengths=seen[layer], layout=quantised.layout)
        out, _ = paged_attention(query[:, 0], raw, tiers=tiers)
        return pool, out[:, None]

    pool, hidden = model(tokens[:, None], positions, attend, cache.pool)
    cache = replace(cache, pool=pool, num_tokens=cache.num_tokens + counts)
    return cache, jnp.where(granted, model.logits(hidden[:, 0]), jnp.nan)
