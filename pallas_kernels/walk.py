"""The resident blocks of all rows (a row: one KV head of one sequence) as one flat list of segments.

A loop whose bound is data takes some segments at a time. So the cost follows the blocks that are resident, neither the
table's width nor the longest head.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.pool_values import IN_BOUNDS

KVS_A_STEP = {"gpu": 64 * 1024, "tpu": 64 * 1024}
"""By platform: a GPU or TPU wants few large steps; elsewhere what is worked on should stay in the caches."""
FEW_KVS = 1024


class Part(NamedTuple):
    """The segments of one step, and the rows that they are of."""

    blocks: Array
    """``i32[step * segment_blocks]``; the null block where there is none."""
    row: Array
    """``i32[step]``."""
    segment: Array
    """``i32[step]``: which of its row's each is; as many as a row can have where there is none."""
    places: Array
    """``i32[step, kvs]`` of each KV within its row."""
    held: Array
    """``bool[step, kvs]``."""


class Walk(NamedTuple):
    """The list of segments, and its steps."""

    first: Array
    """``i32[rows]``: the list's index of each row's first segment."""
    steps: Array
    """``i32[]``."""
    step: int
    """Segments a step."""
    row_segments: int
    """Segments that a row can have."""
    part: Callable[[Array], Part]
    """Of the ``i``-th step."""

    @property
    def most_steps(self) -> int:
        """What ``steps`` can be."""
        return -(-self.first.shape[0] * self.row_segments // self.step)


def walk(
    table: Array, lengths: Array, block_size: int, *, segment_blocks: int = 1, segments_a_step: int | None = None
) -> Walk:
    """Over blocks ``i32[rows, max_blocks]``, a row's from the left, of ``i32[rows]`` KVs, ``block_size`` a block.

    ``segments_a_step``: None is as many as make a step that suits the platform.
    """
    rows, max_blocks = table.shape
    segment_kvs, row_segments = segment_blocks * block_size, -(-max_blocks // segment_blocks)
    most = segments_a_step or max(1, KVS_A_STEP.get(jax.default_backend(), FEW_KVS) // segment_kvs)
    step = min(most, rows * row_segments)
    blocks = -(-lengths // block_size)
    segments = -(-blocks // segment_blocks)
    end = jnp.cumsum(segments, dtype=jnp.int32)
    first, total = end - segments, end[-1]

    def part(i: Array) -> Part:
        index = i * step + jnp.arange(step, dtype=jnp.int32)
        row = jnp.minimum(jnp.sum(index[:, None] >= end[None, :], axis=1, dtype=jnp.int32), rows - 1)
        segment, exists = index - first[row], index < total
        column = segment[:, None] * segment_blocks + jnp.arange(segment_blocks, dtype=jnp.int32)
        resident = exists[:, None] & (column < blocks[row][:, None])
        found = table.at[row[:, None], jnp.minimum(column, max_blocks - 1)].get(mode=IN_BOUNDS)
        places = segment[:, None] * segment_kvs + jnp.arange(segment_kvs, dtype=jnp.int32)
        return Part(
            blocks=jnp.where(resident, found, 0).reshape(-1),
            row=row,
            segment=jnp.where(exists, segment, row_segments),
            places=places,
            held=exists[:, None] & (places < lengths[row][:, None]),
        )

    return Walk(first, -(-total // step), step, row_segments, part)
