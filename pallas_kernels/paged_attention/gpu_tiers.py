"""Attention over both tiers for NVIDIA Hopper GPUs: a kernel a tier, and XLA joins what they give.

As in ``gpu`` the blocks of all rows (a row: one KV head of one sequence) are cut into segments
of about equal length, one program each. Where significance is asked for the kernels write their logits, and the
reference goes over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_warpgroup import LANE, ROWS, tiled
from pallas_kernels.kvs import RawKVs
from pallas_kernels.online_softmax import Softmax
from pallas_kernels.paged_attention import gpu, gpu_tiers_softmax, xla_tiers
from pallas_kernels.paged_attention.gpu_merge import merge
from pallas_kernels.paged_attention.gpu_segments import plan_work
from pallas_kernels.paged_attention.gpu_tensor_cores import QUERIES
from pallas_kernels.paged_attention.gpu_tiers_codes import rows_held, tiles, token_of
from pallas_kernels.paged_attention.types import Observe, Observed, Significance, Significant, TieredKVs
from pallas_kernels.quantised_block.layout import LANES, Segments
from pallas_kernels.walk import Walk

HEAD_DIMS = (64, 128)
SEGMENT_KVS = 256
"""KVs of a segment at least."""
RING_BYTES = 48 * 1024
"""Of shared memory for blocks on their way, in two stages or more: four programs fit a multiprocessor."""
MOST_BYTES = 72 * 1024
"""Of a block: two stages are to fit, and queries and weights of ``MOST_GROUPS``."""
MOST_GROUPS = 8


class Part(NamedTuple):
    """The softmax over some of each row's KVs."""

    output: Array
    """``f32[rows, group, head_dim]``."""
    maximum: Array
    """``f32[rows, group]``, of logits for powers of two."""
    total: Array


def paged_attention(
    query: Array,
    raw: RawKVs | None,
    tiers: TieredKVs,
    *,
    observe: Observe | Significance | None = None,
    next_position: Array | None = None,
    interpret: Any = False,
) -> tuple[Array, Observed | Significant | None]:
    """See ``api.paged_attention``; ``interpret`` takes ``InterpretGPUParams``."""
    batch, heads, head_dim = query.shape
    kv_heads = tiers.block_table.shape[1]
    rows, group = batch * kv_heads, heads // kv_heads
    table, lengths = (x.astype(jnp.int32).reshape(rows, -1) for x in (tiers.block_table, tiers.lengths))
    attend = partial(
        _attend,
        query.reshape(rows, group, head_dim),
        tiers.pool,
        table,
        keep=observe is not None,
        interpret=interpret,
    )
    parts, logits, walks = [], [], xla_tiers.walks_of(tiers)
    for index, tier in enumerate(tiers.layout.tiers):
        part, kept = attend(lengths[:, index], tier, walks[index], from_right=index > 0)
        parts.append(part)
        logits.append(kept)
    beside = []
    if raw is not None:
        keep = observe is not None and not isinstance(observe, Significance)
        *part, beside = gpu.partial_attention(query, raw, keep=keep, interpret=interpret)
        parts.append(Part(*part))
    whole = join(parts)
    output = whole.output.reshape(batch, heads, head_dim).astype(query.dtype)
    if observe is None:
        return output, None
    softmax = Softmax(whole.maximum * math.log(2), whole.total, whole.output)
    of_steps = [_steps_of(*each, group) for each in zip(logits, tiers.layout.tiers, walks, strict=True)]
    if isinstance(observe, Significance):
        assert next_position is not None
        return output, xla_tiers.significant(tiers, softmax, walks, of_steps, observe, next_position)
    assert raw is not None
    p = gpu.probabilities(beside[0], raw, whole.maximum, whole.total)
    return output, Observed(observe(p), xla_tiers.scored(tiers, softmax, walks, of_steps, observe))


def check(query: Array, raw: RawKVs | None, tiers: TieredKVs) -> None:
    """Raises ValueError for what the kernels can't take."""
    layout = tiers.layout
    if layout.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"the GPU kernels take quantised heads of {HEAD_DIMS} values, not {layout.head_dim}; use 'xla'"
        )
    gpu.check_group(query, tiers.block_table)
    if layout.block_bytes > MOST_BYTES:
        raise ValueError(
            f"the GPU kernels take quantised blocks of at most {MOST_BYTES} bytes, not {layout.block_bytes}: give the "
            "layout fewer tokens, or use 'xla'"
        )
    high, low = layout.high, layout.low
    if max(high.key_groups, high.value_groups, low.key_groups, low.value_groups) > MOST_GROUPS:
        raise ValueError(
            f"the GPU kernels take vectors of at most {MOST_GROUPS} groups, not {high} and {low}; use 'xla'"
        )
    if raw is not None:
        gpu.check(query, raw)


def join(parts: list[Part]) -> Part:
    """The softmax over the KVs of all of them."""
    maximum = jnp.stack([part.maximum for part in parts]).max(0)
    totals = [part.total * jnp.exp2(part.maximum - maximum) for part in parts]
    output = sum(part.output * total[..., None] for part, total in zip(parts, totals, strict=True))
    total = jnp.maximum(sum(totals), jnp.finfo(jnp.float32).tiny)
    return Part(output / total[..., None], maximum, total)


def _attend(
    queries: Array,
    pool: Array,
    table: Array,
    lengths: Array,
    tier: Segments,
    blocks_of: Walk,
    *,
    keep: bool,
    from_right: bool,
    interpret: Any,
) -> tuple[Part, list[Array]]:
    """The softmax over a tier's KVs; and if they are to be kept the logits, ``f32[blocks of all rows, n, QUERIES]`` of
    ``n`` KVs in the order of ``token_of``.

    Args:
      queries: ``[rows, group, head_dim]``.
      pool: ``u32[blocks, rows of a block, 128]``.
      table: ``i32[rows, max_blocks]`` of both tiers.
      lengths: ``i32[rows]`` KVs in this tier.
      tier: what lies where in its blocks.
      blocks_of: the walk over its blocks, in whose order the logits are kept.
      keep: whether they are.
      from_right: whether the tier fills the table from the right.
      interpret: see ``paged_attention``.
    """
    rows, group, head_dim = queries.shape
    fmt, max_blocks = tier.format, table.shape[1]
    work = plan_work(lengths, max_blocks * tier.tokens, tier.tokens, max(1, SEGMENT_KVS // tier.tokens))
    segments = work.table.shape[0]
    lines = jnp.concatenate([work.table, blocks_of.first[work.table[:, :1]]], axis=1)

    parts = 1 if queries.dtype == jnp.bfloat16 else 3
    own = _own_values(queries, fmt.key_groups)
    split = jnp.stack(gpu_tiers_softmax.split(own, parts), axis=2).reshape(rows, -1, QUERIES, head_dim)

    block = rows_held(tier, head_dim), LANES
    stages = max(2, RING_BYTES // (4 * block[0] * LANES))
    shapes = [(segments, head_dim, QUERIES), (segments, QUERIES), (segments, QUERIES)]
    if keep:
        shapes.append((blocks_of.most_steps * blocks_of.step, tiles(tier) * ROWS, QUERIES))
    laid_out = tiled(jnp.dtype(jnp.bfloat16), bool(interpret))
    output, maximum, total, *logits = plgpu.kernel(
        gpu_tiers_softmax.segment_kernel(tier, head_dim, parts, from_right, bool(interpret)),
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        scratch_types=(
            plgpu.SMEM((stages, *block), jnp.uint32),
            plgpu.Barrier(num_barriers=stages),
            plgpu.SMEM(split.shape[1:], jnp.bfloat16, transforms=laid_out),
            plgpu.SMEM((fmt.value_groups * parts, QUERIES, ROWS), jnp.bfloat16, transforms=laid_out),
            plgpu.Barrier(),
        ),
        grid=(segments,),
        grid_names=("segment",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=LANE, reduction_scratch_bytes=4096),
        interpret=interpret,
    )(split, own.sum(-1), pool, table, lines)
    output, maximum, total = merge(
        work.end, output, maximum, total, axis=1, layout=gpu_tiers_softmax.LAYOUT, interpret=interpret
    )
    return Part(output.swapaxes(1, 2)[:, :group], maximum[:, :group], total[:, :group]), logits


def _own_values(queries: Array, groups: int) -> Array:
    """For each group of K's values what of the queries meets it, ``f32[rows, groups, QUERIES, head_dim]``."""
    _, group, head_dim = queries.shape
    padded = jnp.pad(queries.astype(jnp.float32), ((0, 0), (0, QUERIES - group), (0, 0)))
    own = jnp.arange(head_dim) // (head_dim // groups) == jnp.arange(groups)[:, None, None]
    return jnp.where(own, padded[:, None], 0.0)


def _steps_of(kept: list[Array], tier: Segments, blocks_of: Walk, group: int) -> Callable[[Array], Array]:
    """What gives the logits of a step of the walk, for powers of e: ``f32[step, group, tokens]``."""
    place = np.argsort(token_of(np.arange(tiles(tier) * ROWS), tier))[: tier.tokens]

    def step(i: Array) -> Array:
        logits = lax.dynamic_slice_in_dim(kept[0], i * blocks_of.step, blocks_of.step)
        return jnp.swapaxes(logits[:, place, :group], 1, 2) * math.log(2)

    return step
