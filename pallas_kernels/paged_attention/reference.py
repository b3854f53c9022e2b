"""Decode attention in plain XLA: the oracle of the kernels' tests, and the path on CPU.

The blocks of all rows (a row: one KV head of one sequence) are walked as one flat list, cut into segments of about 128
KVs and taken several segments at a time by a loop whose bound is data. So the cost follows the blocks that are
resident, neither the table's width nor the longest head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.pool_values import read_rows

SEGMENT_KVS = 128
SEGMENTS_A_STEP = 16
MASKED = -1e30  # finite, so that a fully masked segment gives exp(0) times a zero mask and never NaN
IN_BOUNDS = "promise_in_bounds"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Walk:
    """The flat list of segments: row ``r`` owns segments ``first[r] .. end[r] - 1``."""

    first: Array  # i32[rows]
    end: Array  # i32[rows]
    blocks: Array  # i32[rows] resident blocks

    @property
    def segments(self) -> Array:
        return self.end[-1]


def plan_walk(lengths: Array, block_size: int, segment_blocks: int) -> Walk:
    blocks = -(-lengths // block_size)
    segments = -(-blocks // segment_blocks)
    end = jnp.cumsum(segments)
    return Walk(first=end - segments, end=end, blocks=blocks)


def paged_attention(
    query: Array,
    pool: Array,
    block_table: Array,
    lengths: Array,
    *,
    observe: tuple[Callable[[Array], Array], ...] = (),
) -> tuple[Array, tuple[Array, ...]]:
    """See ``api.paged_attention``."""
    batch, heads, head_dim = query.shape
    kv_heads, max_blocks = block_table.shape[1:]
    block_size, half = pool.shape[1], pool.shape[2] // 2
    rows, group = batch * kv_heads, heads // kv_heads
    segment_blocks = max(1, SEGMENT_KVS // block_size)
    row_segments = -(-max_blocks // segment_blocks)
    step = min(SEGMENTS_A_STEP, rows * row_segments)
    segment_kvs = segment_blocks * block_size

    scaled = (query.astype(jnp.float32) * head_dim**-0.5).reshape(rows, group, head_dim)
    table = jnp.pad(block_table.reshape(rows, max_blocks), ((0, 0), (0, row_segments * segment_blocks - max_blocks)))
    lengths = lengths.reshape(rows)
    walk = plan_walk(lengths, block_size, segment_blocks)
    steps = -(-walk.segments // step)

    def segment_rows(i: Array) -> tuple[Array, Array, Array]:
        """Row, place within the row, and whether it exists, of each segment of step ``i``."""
        segment = i * step + jnp.arange(step)
        row = jnp.minimum(jnp.sum(segment[:, None] >= walk.end[None, :], axis=1), rows - 1)
        return row, segment - walk.first[row], segment < walk.segments

    def attend(i: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        maximum, total, output, logits = carry
        row, place, exists = segment_rows(i)
        column = place[:, None] * segment_blocks + jnp.arange(segment_blocks)
        resident = exists[:, None] & (column < walk.blocks[row][:, None])
        column = jnp.minimum(column, table.shape[1] - 1)
        blocks = jnp.where(resident, table.at[row[:, None], column].get(mode=IN_BOUNDS), 0)
        kv = read_rows(pool.at[blocks].get(mode=IN_BOUNDS)).reshape(step, segment_kvs, 2 * half)
        index = place[:, None] * segment_kvs + jnp.arange(segment_kvs)
        held = exists[:, None] & (index < lengths[row][:, None])

        s = jnp.einsum("cgd,ctd->cgt", scaled.at[row].get(mode=IN_BOUNDS), kv[..., :head_dim])
        s = jnp.where(held[:, None], s, MASKED)
        if observe:
            logits = lax.dynamic_update_slice(logits, s, (i * step, 0, 0))
        new_maximum = maximum.at[row].max(s.max(-1), mode=IN_BOUNDS)
        p = jnp.where(held[:, None], jnp.exp(s - new_maximum[row][..., None]), 0.0)
        # A freed block keeps its old bytes, and 0 * NaN is NaN: V is masked too.
        value = jnp.where(held[..., None], kv[..., half : half + head_dim], 0.0)
        decay = jnp.exp(maximum - new_maximum)
        total = (total * decay).at[row].add(p.sum(-1), mode=IN_BOUNDS)
        output = (output * decay[..., None]).at[row].add(jnp.einsum("cgt,ctd->cgd", p, value), mode=IN_BOUNDS)
        return new_maximum, total, output, logits

    logits_shape = (-(-rows * row_segments // step) * step, group, segment_kvs) if observe else (0, group, segment_kvs)
    start = (
        jnp.full((rows, group), MASKED),
        jnp.zeros((rows, group)),
        jnp.zeros((rows, group, head_dim)),
        jnp.zeros(logits_shape),
    )
    maximum, total, output, logits = lax.fori_loop(0, steps, attend, start)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    output = (output / total[..., None]).reshape(batch, heads, head_dim).astype(query.dtype)
    if not observe:
        return output, ()

    def normalise(i: Array, masses: tuple[Array, ...]) -> tuple[Array, ...]:
        row, place, exists = segment_rows(i)
        s = lax.dynamic_slice(logits, (i * step, 0, 0), (step, group, segment_kvs))
        held = exists[:, None] & (place[:, None] * segment_kvs + jnp.arange(segment_kvs) < lengths[row][:, None])
        p = jnp.where(held[:, None], jnp.exp(s - maximum[row][..., None]) / total[row][..., None], 0.0)
        place = jnp.where(exists, place, row_segments)  # a segment that doesn't exist is dropped
        return tuple(m.at[row, place].set(f(p), mode="drop") for m, f in zip(masses, observe, strict=True))

    empty = tuple(jnp.zeros((rows, row_segments, segment_kvs)) for _ in observe)
    masses = lax.fori_loop(0, steps, normalise, empty)
    width = max_blocks * block_size
    return output, tuple(m.reshape(batch, kv_heads, -1)[..., :width] for m in masses)
