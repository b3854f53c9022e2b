"""Partial results of decode attention's segments joined by row, on a GPU.

A row's segments follow each other, and a program goes over them in their order: without atomics, whose order is chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_warpgroup import LANE, MASKED, ROWS, laid, load, store

TURN = 16
"""Segments that are loaded before the first is used: so many share one wait, and they fit the registers."""


def merge(
    end: Array, output: Array, maximum: Array, total: Array, *, axis: int, layout: Any, interpret: Any
) -> tuple[Array, Array, Array]:
    """Normalised output, maximum of the logits (base 2) and sum of each row; zero, ``MASKED`` and tiny without KVs.

    Args:
      end: ``i32[rows]`` the segment after each row's last.
      output: ``f32[segments, ...]`` not normalised, queries along one axis and a multiple of 64 values along the other.
      maximum: ``f32[segments, queries]``.
      total: ``f32[segments, queries]``.
      axis: which of a segment's output are the queries: 0 or 1.
      layout: how the threads hold 64 values of all queries.
      interpret: takes ``InterpretGPUParams``.
    """
    rows, queries = end.shape[0], maximum.shape[1]
    shapes = (rows, *output.shape[1:]), (rows, queries), (rows, queries)
    return plgpu.kernel(
        merge_kernel(axis, layout, bool(interpret)),
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        grid=(rows, output.shape[2 - axis] // ROWS),
        grid_names=("row", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=LANE),
        interpret=interpret,
    )(end, output, maximum, total)


def merge_kernel(axis: int, layout: Any, interpret: bool) -> Callable[..., None]:
    """64 values of a row's queries."""
    by_query = layout.reduce(1 - axis)

    def kernel(
        end_ref: Any,  # i32[rows]
        output_ref: Any,  # f32[segments, ...]
        maximum_ref: Any,  # f32[segments, queries]
        total_ref: Any,  # f32[segments, queries]
        whole_ref: Any,  # f32[rows, ...]
        highest_ref: Any,  # f32[rows, queries]
        sum_ref: Any,  # f32[rows, queries]
    ) -> None:
        row, part = lax.axis_index("row"), lax.axis_index("part")
        queries = maximum_ref.shape[1]
        shape = (queries, ROWS) if axis == 0 else (ROWS, queries)
        mine = pl.ds(part * ROWS, ROWS)
        mine = (slice(None), mine) if axis == 0 else (mine, slice(None))
        first, end = jnp.where(row > 0, end_ref[jnp.maximum(row - 1, 0)], 0), end_ref[row]

        def place(x: Array) -> Array:
            return laid(lax.broadcast_in_dim(x, shape, (axis,)), layout, interpret)

        def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            output, highest, whole = carry
            places = [first + i * TURN + k for k in range(TURN)]
            segments = [jnp.minimum(at, end - 1) for at in places]  # the last one again, to be given no weight
            outputs = [load(output_ref.at[(s, *mine)], layout, interpret) for s in segments]
            maxima, totals = (
                [load(ref.at[s], by_query, interpret) for s in segments] for ref in (maximum_ref, total_ref)
            )
            new = highest
            for maximum in maxima:
                new = jnp.maximum(new, maximum)
            decay = jnp.exp2(highest - new)
            output, whole = output * place(decay), whole * decay
            for k, at in enumerate(places):
                weight = jnp.exp2(maxima[k] - new) * (at < end).astype(jnp.float32)
                output, whole = output + outputs[k] * place(weight), whole + totals[k] * weight
            return output, new, whole

        nothing = (
            laid(jnp.zeros(shape, jnp.float32), layout, interpret),
            laid(jnp.full((queries,), MASKED, jnp.float32), by_query, interpret),
            laid(jnp.zeros((queries,), jnp.float32), by_query, interpret),
        )
        turns = lax.div(end - first + TURN - 1, jnp.int32(TURN))
        output, highest, whole = lax.fori_loop(0, turns, add, nothing)
        whole = jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)
        store(whole_ref.at[(row, *mine)], output / place(whole), interpret)

        @pl.when(part == 0)
        def _():
            store(highest_ref.at[row], highest, interpret)
            store(sum_ref.at[row], whole, interpret)

    return kernel
