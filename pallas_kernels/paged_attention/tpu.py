"""Decode attention as a TPU kernel: one grid step a row (a KV head of a sequence), its blocks streamed tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention.types import Observe
from pallas_kernels.tpu_tiles import (
    CORES,
    LANES,
    MASKED,
    SMEM_ENTRIES,
    UNCHECKED,
    TileStream,
    Tiling,
    check_pool,
    held_blocks,
    lanes_of,
    product,
    rows_at_once,
    tiling,
)


class Results(NamedTuple):
    """Of attention, by row (a KV head of a sequence) but for the output."""

    output: Array
    masses: Array | None
    """``f32[rows, tiles, tile kvs]``, where they are observed."""
    sums: Array | None
    """``f32[rows, group, 128]``, where they are asked for: maximum of the logits and sum in the first two lanes."""


Running = tuple[Array, Array, Array]
"""Of the softmax so far: maximum and sum ``[group, 1]``, output ``[group, width]``."""


def paged_attention(
    query: Array,
    raw: RawKVs,
    *,
    observe: Observe | None = None,
    tiles: Tiling | None = None,
    smem_entries: int = SMEM_ENTRIES,
    interpret: Any = False,
) -> tuple[Array, Array | None]:
    """See ``api.paged_attention``.

    ``tiles`` and ``smem_entries`` are for tests: how heads are cut, and how large a table one call may take.

    Raises:
      ValueError: a table row too long for SMEM.
    """
    batch, kv_heads, max_blocks = raw.block_table.shape
    tiles = tiles or tiling(raw.pool, max_blocks)
    run = partial(_run, raw.pool, observe=observe, tiles=tiles, interpret=interpret)
    out, masses, _ = _in_calls(run, query, raw, smem_entries)
    if masses is None:
        return out, None
    return out, masses.reshape(batch, kv_heads, -1)[..., : max_blocks * tiles.block_size]


def check(query: Array, raw: RawKVs) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_pool(raw.pool, query.shape[-1])


def partial_attention(query: Array, raw: RawKVs, *, interpret: Any = False) -> tuple[Array, Array]:
    """Attention to some of a head's KVs, to be joined with that to others.

    Returns:
      Output as of ``paged_attention``, float32; and ``f32[rows, group, 128]``, of which the first two lanes are the
      maximum of the logits and the sum of their exponentials.
    """
    tiles = tiling(raw.pool, raw.block_table.shape[-1])
    run = partial(_run, raw.pool, tiles=tiles, sums=True, interpret=interpret)
    out, _, sums = _in_calls(run, query.astype(jnp.float32), raw, SMEM_ENTRIES)
    assert sums is not None  # they are asked for
    return out, sums


def _in_calls(run: Callable[..., Results], query: Array, raw: RawKVs, smem_entries: int) -> Results:
    """As many rows a call as SMEM takes; the output is ``[batch, heads, head_dim]``."""
    batch, heads, head_dim = query.shape
    kv_heads, max_blocks = raw.block_table.shape[1:]
    at_once = rows_at_once(max_blocks, smem_entries)
    rows, group = batch * kv_heads, heads // kv_heads
    lanes = lanes_of(raw.pool)

    query = query.reshape(rows, group, head_dim)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, lanes.width - head_dim)))
    arguments = (padded, raw.block_table.reshape(rows, max_blocks), raw.lengths.reshape(rows))
    parts = [run(*(x[at : at + at_once] for x in arguments), scale=head_dim**-0.5) for at in range(0, rows, at_once)]
    out, masses, sums = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    return Results(out[..., lanes.value_at : lanes.value_at + head_dim].reshape(batch, heads, head_dim), masses, sums)


def _run(
    pool: Array,
    query: Array,
    table: Array,
    lengths: Array,
    *,
    scale: float,
    observe: Observe | None = None,
    tiles: Tiling,
    sums: bool = False,
    interpret: Any,
) -> Results:
    """One call: query ``[rows, group, width]`` -> output like it."""
    rows, group, width = query.shape
    steps = -(-rows // CORES)
    pad = CORES * steps - rows
    query = jnp.pad(query, ((0, pad), (0, 0), (0, 0)))

    def of_row(*dims: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *dims), lambda core, step, *_: (core * steps + step, 0, 0))

    shapes = (  # of ``Results``
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((CORES * steps, tiles.tiles, tiles.kvs), jnp.float32) if observe else None,
        jax.ShapeDtypeStruct((CORES * steps, group, LANES), jnp.float32) if sums else None,
    )
    logits = pltpu.VMEM((tiles.tiles, group, tiles.kvs), jnp.float32) if observe else None
    kernel = partial(_kernel, scale=scale, observe=observe, tiles=tiles, steps=steps)
    results = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(CORES, steps),
            in_specs=[of_row(group, width), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=jax.tree.map(lambda x: of_row(*x.shape[1:]), shapes),
            scratch_shapes=(TileStream.scratch_shapes(tiles, pool), logits),
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(tiles, pool, observed=bool(observe)),
            **UNCHECKED,
        ),
        name="paged_attention",
        interpret=interpret,
    )(jnp.pad(lengths, (0, pad)), jnp.pad(table, ((0, pad), (0, 0))).reshape(-1), query, pool)
    return Results(*jax.tree.map(lambda x: x[:rows], results))


def _vmem_limit(tiles: Tiling, pool: Array, *, observed: bool) -> int:
    buffers = tiles.buffers * tiles.kvs * pool.shape[-1] * pool.dtype.itemsize
    masses = tiles.tiles * tiles.kvs * 4 * 10 * observed
    return 16 * 2**20 + buffers + masses


def _kernel(
    lengths: Any,
    table: Any,
    query_ref: Any,
    pool: Any,
    out_ref: Any,
    mass_ref: Any | None,
    sum_ref: Any | None,
    stream_scratch: tuple[Any, Any, Any],
    logits_ref: Any | None,
    *,
    scale: float,
    observe: Observe | None,
    tiles: Tiling,
    steps: int,
) -> None:
    core, step = pl.program_id(0), pl.program_id(1)
    row = core * steps + step
    length = lengths[row]

    items = core * steps, (core + 1) * steps
    stream = TileStream(tiles, pool, table, held_blocks(lengths, tiles), stream_scratch, items)
    buffer = stream.buffer
    pl.when(step == 0)(stream.start)

    query = query_ref[0].astype(buffer.dtype)
    group, width = query.shape
    value_at = buffer.shape[-1] - width  # K is the row's first ``width`` lanes, V its last; they may be the same
    end = stream.tiles(row)[1]

    def attend(tile: Array, carry: Running) -> Running:
        slot = stream.take(row, tile)
        left = length - tile * tiles.kvs

        def over(kvs: int, carry: Running) -> Running:
            """The tile's first so many KVs into the running softmax."""
            maximum, total, output = carry
            stream.clear_past(slot, left, kvs, value_at)
            key, value = buffer[slot, :kvs, :width], buffer[slot, :kvs, value_at:]
            s = product(query, key, (1, 1))
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 1) < left, s * scale, MASKED)
            if logits_ref is not None:
                logits_ref[tile, :, :kvs] = s
            new_maximum = jnp.maximum(maximum, s.max(-1, keepdims=True))
            p = jnp.exp(s - new_maximum)
            decay = jnp.exp(maximum - new_maximum)
            out = product(p.astype(buffer.dtype), value, (1, 0))
            return new_maximum, total * decay + p.sum(-1, keepdims=True), output * decay + out

        few = tiles.kvs // 4  # a compressed head may be shorter than a tile
        if few % LANES:
            return over(tiles.kvs, carry)
        return lax.cond(left <= few, partial(over, few), partial(over, tiles.kvs), carry)

    start = jnp.full((group, 1), MASKED), jnp.zeros((group, 1)), jnp.zeros((group, width))
    maximum, total, output = lax.fori_loop(0, end, attend, start)
    share = 1.0 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out_ref[0] = (output * share).astype(out_ref.dtype)
    if sum_ref is not None:
        lane = lax.broadcasted_iota(jnp.int32, sum_ref.shape[1:], 1)
        sum_ref[0] = jnp.where(lane == 0, maximum, total)

    if observe and mass_ref is not None and logits_ref is not None:

        def normalise(tile: Array, _: None) -> None:
            s = logits_ref[tile]
            held = lax.broadcasted_iota(jnp.int32, s.shape, 1) < length - tile * tiles.kvs
            p = jnp.where(held, jnp.exp(s - maximum) * share, 0.0)
            mass_ref[0, pl.ds(tile, 1)] = observe(p[None])

        def clear(tile: Array, _: None) -> None:
            mass_ref[0, pl.ds(tile, 1)] = jnp.zeros((1, tiles.kvs))

        lax.fori_loop(0, end, normalise, None)
        lax.fori_loop(end, tiles.tiles, clear, None)
