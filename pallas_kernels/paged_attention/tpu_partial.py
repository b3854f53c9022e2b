"""Attention to some of a head's KVs, to be joined with that to others, by the TPU kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention.tpu import BUFFERS, Results, attend_rows, in_calls
from pallas_kernels.paged_attention.types import Observe
from pallas_kernels.tpu_tiles import SMEM_ENTRIES, tiling
from pallas_kernels.tpu_values import LANES


def partial_attention(query: Array, raw: RawKVs, *, interpret: Any = False) -> tuple[Array, Array]:
    """Attention to some of a head's KVs, to be joined with that to others.

    Returns:
      Output as of ``paged_attention``, float32; and ``f32[rows, group, 128]``, of which the first two lanes are the
      maximum of the logits and the sum of their exponentials.
    """
    out, _, sums = _attend(query, raw, None, interpret)
    assert sums is not None  # they are asked for
    return out, sums


def partial_probabilities(query: Array, raw: RawKVs, *, interpret: Any = False) -> tuple[Array, Array, Array]:
    """As ``partial_attention``, and the probabilities among those KVs, ``f32[batch, kv_heads, group, kvs]``.

    Each query head is a row of its own, so each reads the KVs: meant for few of them.
    """
    batch, kv_heads, max_blocks = raw.block_table.shape
    group = query.shape[1] // kv_heads
    each = RawKVs(raw.pool, *(jnp.repeat(x, group, axis=1) for x in (raw.block_table, raw.lengths)))
    out, p, sums = _attend(query, each, _of_one, interpret)
    assert p is not None
    assert sums is not None
    p = p.reshape(batch, kv_heads, group, -1)[..., : max_blocks * raw.pool.shape[1]]
    return out, sums.reshape(batch * kv_heads, group, LANES), p


def _attend(query: Array, raw: RawKVs, observe: Observe | None, interpret: Any) -> Results:
    tiles = tiling(raw.pool, raw.block_table.shape[-1], buffers=BUFFERS)
    run = partial(attend_rows, raw.pool, observe=observe, tiles=tiles, sums=True, interpret=interpret)
    return in_calls(run, query.astype(jnp.float32), raw, SMEM_ENTRIES)


def _of_one(probability: Array) -> Array:
    """Of a group of one query head."""
    return probability.sum(-2)
