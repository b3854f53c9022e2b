"""Decode attention in plain XLA: the oracle of the kernels' tests, and the path on CPU.

The resident blocks of all rows are walked in segments of about 128 KVs (``walk``).
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.kvs import RawKVs
from pallas_kernels.online_softmax import MASKED, Softmax
from pallas_kernels.paged_attention.types import Observe
from pallas_kernels.pool_values import IN_BOUNDS, read_rows
from pallas_kernels.walk import walk

SEGMENT_KVS = 128
SEGMENTS_A_STEP = 16


def paged_attention(query: Array, raw: RawKVs, *, observe: Observe | None = None) -> tuple[Array, Array | None]:
    """See ``api.paged_attention``."""
    batch, heads, head_dim = query.shape
    pool, block_table, lengths = raw
    kv_heads, max_blocks = block_table.shape[1:]
    block_size, half = pool.shape[1], pool.shape[2] // 2
    rows, group = batch * kv_heads, heads // kv_heads
    segment_blocks = max(1, SEGMENT_KVS // block_size)
    segment_kvs = segment_blocks * block_size
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).reshape(rows, group, head_dim)
    table, lengths = block_table.reshape(rows, max_blocks), lengths.reshape(rows)
    segments = walk(table, lengths, block_size, segment_blocks=segment_blocks, segments_a_step=SEGMENTS_A_STEP)

    def attend(i: Array, carry: tuple[Softmax, Array]) -> tuple[Softmax, Array]:
        softmax, logits = carry
        part = segments.part(i)
        kv = read_rows(pool.at[part.blocks].get(mode=IN_BOUNDS)).reshape(segments.step, segment_kvs, 2 * half)
        s = jnp.einsum("cgd,ctd->cgt", scaled.at[part.row].get(mode=IN_BOUNDS), kv[..., :head_dim])
        s = jnp.where(part.held[:, None], s, MASKED)
        if observe:
            logits = lax.dynamic_update_slice_in_dim(logits, s, i * segments.step, axis=0)
        # A freed block keeps its old bytes, and 0 * NaN is NaN: V is masked too.
        value = jnp.where(part.held[..., None], kv[..., half : half + head_dim], 0.0)
        return softmax.add(part.row, s, part.held, lambda p: jnp.einsum("cgt,ctd->cgd", p, value)), logits

    kept = segments.most_steps * segments.step if observe else 0
    start = Softmax.none(rows, group, head_dim=head_dim), jnp.zeros((kept, group, segment_kvs), jnp.float32)
    softmax, logits = lax.fori_loop(0, segments.steps, attend, start)
    softmax = softmax.floored()
    output = softmax.normalised().reshape(batch, heads, head_dim).astype(query.dtype)
    if observe is None:
        return output, None

    def normalise(i: Array, masses: Array) -> Array:
        part = segments.part(i)
        s = lax.dynamic_slice_in_dim(logits, i * segments.step, segments.step, axis=0)
        p = softmax.probabilities(part.row, s, part.held)
        return masses.at[part.row, part.segment].set(observe(p), mode="drop")  # but for a segment that doesn't exist

    masses = jnp.zeros((rows, segments.row_segments, segment_kvs), jnp.float32)
    masses = lax.fori_loop(0, segments.steps, normalise, masses)
    return output, masses.reshape(batch, kv_heads, -1)[..., : max_blocks * block_size]
