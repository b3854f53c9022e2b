"""Attention over both tiers in plain XLA: the oracle of the kernels' tests, and the path on CPU.

The resident blocks of all rows are walked (``walk``), first the high tier, then the low one, then unquantised blocks,
with one running softmax. Codes go to the dot products as they are; scales and minima are applied to logits and
probabilities.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.kvs import RawKVs
from pallas_kernels.online_softmax import MASKED, Softmax
from pallas_kernels.paged_attention.types import Observe, Observed, Significance, Significant, TieredKVs, Weakest
from pallas_kernels.pool_values import IN_BOUNDS, read_rows
from pallas_kernels.quantised_block import blocks, quantizer
from pallas_kernels.quantised_block.layout import Segments
from pallas_kernels.walk import Walk, walk


def paged_attention(
    query: Array,
    raw: RawKVs | None,
    tiers: TieredKVs,
    *,
    observe: Observe | Significance | None = None,
    next_position: Array | None = None,
) -> tuple[Array, Observed | Significant | None]:
    """See ``api.paged_attention``."""
    batch, heads, head_dim = query.shape
    pool, layout = tiers.pool, tiers.layout
    kv_heads = tiers.block_table.shape[1]
    rows, group = batch * kv_heads, heads // kv_heads
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).reshape(rows, group, head_dim)
    words = pool.reshape(pool.shape[0], -1)
    walks = walks_of(tiers)
    softmax = Softmax.none(rows, group, head_dim=head_dim)
    logits = []
    for tier, blocks_of in zip(layout.tiers, walks, strict=True):
        softmax, kept = _attend_tier(softmax, scaled, words, tier, blocks_of, keep=observe is not None)
        logits.append(kept)
    beside = None
    if raw is not None:
        keep = observe is not None and not isinstance(observe, Significance)
        beside = walk(raw.block_table.reshape(rows, -1), raw.lengths.reshape(rows), raw.pool.shape[1])
        softmax, kept = _attend_raw(softmax, scaled, raw, beside, keep=keep)
        logits.append(kept)
    softmax = softmax.floored()
    output = softmax.normalised().reshape(batch, heads, head_dim).astype(query.dtype)
    if observe is None:
        return output, None

    def steps_of(kept: Array) -> Callable[[Array], Array]:
        return lambda i: lax.dynamic_index_in_dim(kept, i, 0, keepdims=False)

    of_tiers = [steps_of(kept) for kept in logits[:2]]
    if isinstance(observe, Significance):
        assert next_position is not None
        return output, significant(tiers, softmax, walks, of_tiers, observe, next_position)
    assert beside is not None
    masses = _masses(softmax, logits[2], beside, observe).reshape(batch, kv_heads, -1)
    return output, Observed(masses, scored(tiers, softmax, walks, of_tiers, observe))


def walks_of(tiers: TieredKVs) -> list[Walk]:
    """Over each tier's blocks."""
    batch, kv_heads, _ = tiers.lengths.shape
    table, lengths = tiers.block_table.reshape(batch * kv_heads, -1), tiers.lengths.reshape(-1, 2)
    high, low = tiers.layout.tiers
    return [walk(table, lengths[:, 0], high.tokens), walk(table[:, ::-1], lengths[:, 1], low.tokens)]


def scored(
    tiers: TieredKVs, softmax: Softmax, walks: list[Walk], logits: list[Callable[[Array], Array]], observe: Observe
) -> Array:
    """The pool with scores added to; arguments as for ``significant``."""
    nobody = jnp.zeros(tiers.lengths.shape[0], jnp.int32)
    return significant(tiers, softmax, walks, logits, Significance.of_scores(observe), nobody).pool


def significant(
    tiers: TieredKVs,
    softmax: Softmax,
    walks: list[Walk],
    logits: list[Callable[[Array], Array]],
    significance: Significance,
    next_position: Array,
) -> Significant:
    """The pool with scores added to, and each head's weakest KVs.

    Args:
      tiers: the KVs.
      softmax: over all KVs of each row, ``floored``; the output isn't used.
      walks: over each tier.
      logits: what gives those of a walk's ``i``-th step, ``f32[step, group, tokens]``.
      significance, next_position: see ``api.paged_attention``.
    """
    batch, kv_heads, _ = tiers.lengths.shape
    words = tiers.pool.reshape(tiers.pool.shape[0], -1)
    position = jnp.repeat(next_position, kv_heads)
    values, indices = [], []
    for tier, blocks_of, of_step in zip(tiers.layout.tiers, walks, logits, strict=True):
        words, value, index = _observe(words, softmax, of_step, tier, blocks_of, significance, position)
        values.append(value.reshape(batch, -1))
        indices.append(index.reshape(batch, -1))
    weakest = Weakest(value=jnp.stack(values, axis=-1), index=jnp.stack(indices, axis=-1))
    return Significant(words.reshape(tiers.pool.shape), weakest)


def _attend_tier(
    softmax: Softmax, scaled: Array, words: Array, tier: Segments, blocks_of: Walk, *, keep: bool
) -> tuple[Softmax, Array]:
    """The softmax with a tier's KVs in it; and the logits, ``f32[steps, step, group, tokens]``, if they are kept."""
    _, group, head_dim = scaled.shape
    logits = jnp.zeros((blocks_of.most_steps if keep else 0, blocks_of.step, group, tier.tokens), jnp.float32)

    def step(i: Array, carry: tuple[Softmax, Array]) -> tuple[Softmax, Array]:
        softmax, logits = carry
        part = blocks_of.part(i)
        key, value = blocks.read_codes(words.at[part.blocks].get(mode=IN_BOUNDS), tier, head_dim)
        q = scaled.at[part.row].get(mode=IN_BOUNDS)
        s = jnp.where(part.held[:, None], _dot_keys(q, key), MASKED)
        if keep:
            logits = lax.dynamic_update_index_in_dim(logits, s, i, 0)
        return softmax.add(part.row, s, part.held, lambda p: _dot_values(p, value, part.held)), logits

    return lax.fori_loop(0, blocks_of.steps, step, (softmax, logits))


def _attend_raw(softmax: Softmax, scaled: Array, raw: RawKVs, blocks_of: Walk, *, keep: bool) -> tuple[Softmax, Array]:
    """As ``_attend_tier``, of unquantised KVs."""
    _, group, head_dim = scaled.shape
    half = raw.pool.shape[2] // 2
    logits = jnp.zeros((blocks_of.most_steps if keep else 0, blocks_of.step, group, raw.pool.shape[1]), jnp.float32)

    def step(i: Array, carry: tuple[Softmax, Array]) -> tuple[Softmax, Array]:
        softmax, logits = carry
        part = blocks_of.part(i)
        kv = read_rows(raw.pool.at[part.blocks].get(mode=IN_BOUNDS))
        s = jnp.einsum("cgd,ctd->cgt", scaled.at[part.row].get(mode=IN_BOUNDS), kv[..., :head_dim])
        value = jnp.where(part.held[..., None], kv[..., half : half + head_dim], 0.0)
        s = jnp.where(part.held[:, None], s, MASKED)
        if keep:
            logits = lax.dynamic_update_index_in_dim(logits, s, i, 0)
        return softmax.add(part.row, s, part.held, lambda p: jnp.einsum("cgt,ctd->cgd", p, value)), logits

    return lax.fori_loop(0, blocks_of.steps, step, (softmax, logits))


def _masses(softmax: Softmax, logits: Array, blocks_of: Walk, observe: Observe) -> Array:
    """What unquantised KVs are given, ``f32[rows, blocks, kvs]``, from the logits that ``_attend_raw`` kept."""
    rows, kvs = softmax.total.shape[0], logits.shape[-1]

    def step(i: Array, masses: Array) -> Array:
        part = blocks_of.part(i)
        p = softmax.probabilities(part.row, lax.dynamic_index_in_dim(logits, i, 0, keepdims=False), part.held)
        return masses.at[part.row, part.segment].set(observe(p), mode="drop")  # but for a block that doesn't exist

    return lax.fori_loop(0, blocks_of.steps, step, jnp.zeros((rows, blocks_of.row_segments, kvs), jnp.float32))


def _dot_keys(query: Array, key: quantizer.Codes) -> Array:
    """Logits ``[step, group, tokens]`` = scale * (query . codes) + minimum * sum(query), over the groups of values."""
    scale, low = quantizer.unpack_meta(key.meta)  # [step, tokens, groups]
    groups = scale.shape[-1]
    codes = quantizer.as_float(key.codes)
    codes = codes.reshape(*codes.shape[:-1], groups, -1)
    query = query.reshape(*query.shape[:-1], groups, -1)
    dots = jnp.einsum("cgnd,ctnd->cgtn", query, codes)
    return jnp.sum(dots * scale[:, None] + query.sum(-1)[:, :, None] * low[:, None], axis=-1)


def _dot_values(p: Array, value: quantizer.Codes, held: Array) -> Array:
    """Output ``[step, group, head_dim]`` = (p * scale) . codes + sum(p * minimum), over the groups of values."""
    # A freed block keeps its old bytes, and 0 * NaN is NaN: meta is masked as well as p.
    scale, low = (jnp.where(held[..., None], part, 0.0) for part in quantizer.unpack_meta(value.meta))
    codes = quantizer.as_float(value.codes)
    codes = codes.reshape(*codes.shape[:-1], scale.shape[-1], -1)
    weighted = jnp.einsum("cgtn,ctnd->cgnd", p[..., None] * scale[:, None], codes)
    minima = jnp.einsum("cgt,ctn->cgn", p, low)
    return (weighted + minima[..., None]).reshape(*p.shape[:2], -1)


def _observe(
    words: Array,
    softmax: Softmax,
    logits: Callable[[Array], Array],
    tier: Segments,
    blocks_of: Walk,
    significance: Significance,
    next_position: Array,
) -> tuple[Array, Array, Array]:
    """Adds to a tier's scores, and finds each row's weakest KV: its value and its index."""
    rows = softmax.total.shape[0]
    none = jnp.iinfo(jnp.int32).max

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        words, least, index = carry
        part = blocks_of.part(i)
        p = softmax.probabilities(part.row, logits(i), part.held)
        values = words.at[part.blocks, tier.scores : tier.end].get(mode=IN_BOUNDS)
        scores = lax.bitcast_convert_type(values[:, : tier.tokens], jnp.float32) + significance.observe(p)
        positions = lax.bitcast_convert_type(values[:, tier.tokens :], jnp.int32)
        stored = lax.bitcast_convert_type(scores, jnp.uint32)
        words = words.at[part.blocks, tier.scores : tier.positions].set(stored, mode=IN_BOUNDS)

        worth = significance.value(scores, positions, next_position[part.row][:, None])
        worth = jnp.where(part.held, worth, jnp.inf)
        here = worth.min(-1)
        lower = least.at[part.row].min(here, mode=IN_BOUNDS)
        first = jnp.min(jnp.where(worth == here[:, None], part.places, none), axis=-1)
        index = jnp.where(lower < least, none, index)
        index = index.at[part.row].min(jnp.where(here == lower[part.row], first, none), mode=IN_BOUNDS)
        return words, lower, index

    start = (words, jnp.full(rows, jnp.inf, jnp.float32), jnp.full(rows, none, jnp.int32))
    return lax.fori_loop(0, blocks_of.steps, step, start)
