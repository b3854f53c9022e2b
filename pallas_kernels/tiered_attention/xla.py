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
from pallas_kernels.pool_values import IN_BOUNDS, read_rows
from pallas_kernels.quantised_block import BlockLayout, blocks, quantizer
from pallas_kernels.quantised_block.layout import Segments
from pallas_kernels.tiered_attention.types import Significance, Tiered, Weakest
from pallas_kernels.walk import Walk, walk


def tiered_attention(
    query: Array,
    pool: Array,
    block_table: Array,
    lengths: Array,
    layout: BlockLayout,
    *,
    raw: RawKVs | None,
    significance: Significance | None,
    next_position: Array | None,
) -> Tiered:
    """See ``api.tiered_attention``."""
    batch, heads, head_dim = query.shape
    kv_heads = block_table.shape[1]
    rows, group = batch * kv_heads, heads // kv_heads
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).reshape(rows, group, head_dim)
    words = pool.reshape(pool.shape[0], -1)
    table = block_table.reshape(rows, -1)
    tiers = tuple(
        (tier, walk(columns, lengths[i].reshape(rows), tier.tokens))
        for i, (tier, columns) in enumerate(zip(layout.tiers, (table, table[:, ::-1]), strict=True))
    )
    softmax = Softmax.none(rows, group, head_dim=head_dim)
    logits = []
    for tier, blocks_of in tiers:
        softmax, kept = _attend_tier(softmax, scaled, words, tier, blocks_of, keep=significance is not None)
        logits.append(kept)
    if raw is not None:
        softmax = _attend_raw(softmax, scaled, raw)
    softmax = softmax.floored()
    output = softmax.normalised().reshape(batch, heads, head_dim).astype(query.dtype)
    if significance is None or next_position is None:
        return Tiered(output, pool, None)

    def steps_of(kept: Array) -> Callable[[Array], Array]:
        return lambda i: lax.dynamic_index_in_dim(kept, i, 0, keepdims=False)

    walks = [blocks_of for _, blocks_of in tiers]
    arguments = pool, softmax, layout, walks, [steps_of(kept) for kept in logits], significance, next_position
    return Tiered(output, *observe(*arguments))


def observe(
    pool: Array,
    softmax: Softmax,
    layout: BlockLayout,
    walks: list[Walk],
    logits: list[Callable[[Array], Array]],
    significance: Significance,
    next_position: Array,
) -> tuple[Array, Weakest]:
    """The pool with scores added to, and each head's weakest KVs.

    Args:
      pool: ``u32[blocks, rows, 128]``.
      softmax: over all KVs of each row; the output isn't used.
      layout: of the blocks.
      walks: over each tier.
      logits: what gives those of a walk's ``i``-th step, ``f32[step, group, tokens]``.
      significance, next_position: see ``api.tiered_attention``.
    """
    batch = next_position.shape[0]
    words = pool.reshape(pool.shape[0], -1)
    position = jnp.repeat(next_position, softmax.total.shape[0] // batch)
    values, indices = [], []
    for tier, blocks_of, of_step in zip(layout.tiers, walks, logits, strict=True):
        words, value, index = _observe(words, softmax, of_step, tier, blocks_of, significance, position)
        values.append(value.reshape(batch, -1))
        indices.append(index.reshape(batch, -1))
    return words.reshape(pool.shape), Weakest(value=jnp.stack(values), index=jnp.stack(indices))


def _attend_tier(
    softmax: Softmax, scaled: Array, words: Array, tier: Segments, blocks_of: Walk, *, keep: bool
) -> tuple[Softmax, Array]:
    """The softmax with a tier's KVs in it; and the logits, ``f32[steps, step, group, tokens]``, if they are kept."""
    _, group, head_dim = scaled.shape
    logits = jnp.zeros((blocks_of.most_steps if keep else 0, blocks_of.step, group, tier.tokens))

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


def _attend_raw(softmax: Softmax, scaled: Array, raw: RawKVs) -> Softmax:
    rows, _, head_dim = scaled.shape
    half = raw.pool.shape[2] // 2
    blocks_of = walk(raw.block_table.reshape(rows, -1), raw.lengths.reshape(rows), raw.pool.shape[1])

    def step(i: Array, softmax: Softmax) -> Softmax:
        part = blocks_of.part(i)
        kv = read_rows(raw.pool.at[part.blocks].get(mode=IN_BOUNDS))
        s = jnp.einsum("cgd,ctd->cgt", scaled.at[part.row].get(mode=IN_BOUNDS), kv[..., :head_dim])
        value = jnp.where(part.held[..., None], kv[..., half : half + head_dim], 0.0)
        s = jnp.where(part.held[:, None], s, MASKED)
        return softmax.add(part.row, s, part.held, lambda p: jnp.einsum("cgt,ctd->cgd", p, value))

    return lax.fori_loop(0, blocks_of.steps, step, softmax)


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

    start = (words, jnp.full(rows, jnp.inf), jnp.full(rows, none))
    return lax.fori_loop(0, blocks_of.steps, step, start)
