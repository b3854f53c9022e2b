"""A tier's resident blocks as one flat list, taken some at a time by a loop whose bound is data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.reference import plan_walk

KVS_A_STEP = {"gpu": 64 * 1024}
"""By platform: a GPU wants few large steps; elsewhere what is worked on should stay in the processor's caches."""
FEW_KVS = 1024
IN_BOUNDS = "promise_in_bounds"


class Part(NamedTuple):
    """The blocks of one step, and the rows that they are of."""

    blocks: Array
    """``i32[step]``; the null block where there is none."""
    row: Array
    places: Array
    """``i32[step, tokens]`` of each KV within its row's tier."""
    held: Array
    """``bool[step, tokens]``."""


class Walk(NamedTuple):
    """A tier's resident blocks as one flat list."""

    first: Array
    """``i32[rows]``: the list's index of each row's first block."""
    steps: Array
    step: int
    row_blocks: int
    part: Callable[[Array], Part]


def walk(table: Array, lengths: Array, tokens: int) -> Walk:
    """Over a tier's blocks: ``i32[rows, max_blocks]`` from the left, ``i32[rows]`` KVs, ``tokens`` a block."""
    rows, max_blocks = table.shape
    plan = plan_walk(lengths, tokens, 1)
    most = KVS_A_STEP.get(jax.default_backend(), FEW_KVS)
    step = min(max(1, most // tokens), rows * max_blocks)

    def part(i: Array) -> Part:
        block = i * step + jnp.arange(step)
        row = jnp.minimum(jnp.sum(block[:, None] >= plan.end[None, :], axis=1), rows - 1)
        place, real = block - plan.first[row], block < plan.segments
        index = place[:, None] * tokens + jnp.arange(tokens)
        return Part(
            blocks=jnp.where(real, table.at[row, jnp.minimum(place, max_blocks - 1)].get(mode=IN_BOUNDS), 0),
            row=row,
            places=index,
            held=real[:, None] & (index < lengths[row][:, None]),
        )

    return Walk(plan.first, -(-plan.segments // step), step, max_blocks, part)
