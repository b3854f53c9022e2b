"""The softmax over a segment of a head's blocks of one tier, on the tensor cores of an NVIDIA GPU.

Codes are whole numbers below 256, which bfloat16 holds exactly. They go from the words in shared memory by shift and
mask into the registers that the tensor cores read, 64 tokens at a time, in the order in which a word holds them. As in
``gpu_tensor_cores`` the KVs lie down and the queries across; scales and minima meet logits and
probabilities. What a query or a weight has beyond bfloat16 is added by further products, where float32 is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_warpgroup import MASKED, ROWS, gather, iota, laid, load, product, store
from pallas_kernels.paged_attention.gpu_tensor_cores import QUERIES
from pallas_kernels.paged_attention.gpu_tiers_codes import EXPONENT, read, tiles, token_of
from pallas_kernels.quantised_block.layout import LANES, Segments
from pallas_kernels.quantised_block.quantizer import unpack_meta

LAYOUT = plgpu.Layout.WGMMA


def rows_read(tier: Segments) -> int:
    """Rows of a block that attention reads: all but those of nothing but scores and positions."""
    return -(-tier.scores // LANES)


def split(x: Array, parts: int) -> list[Array]:
    """bfloat16 numbers whose sum is ``x``, to so many times 8 bits."""
    found = []
    for _ in range(parts - 1):
        # Cut off, not rounded: a compiler may take rounding forth and back for nothing.
        top = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        found.append(lax.bitcast_convert_type(top, jnp.float32).astype(jnp.bfloat16))
        x = x - lax.bitcast_convert_type(top, jnp.float32)
    return [*found, x.astype(jnp.bfloat16)]


class Softmax(NamedTuple):
    """Of a segment so far; all by query, ``[..., QUERIES]``."""

    maximum: Array
    """``f32[QUERIES]``, of logits for powers of two."""
    total: Array
    """``f32[64, QUERIES]``: a sum for each row of a tile."""
    minima: list[Array]
    """``f32[64, QUERIES]`` for each group of values: probabilities times minima, summed likewise."""
    output: list[Array]
    """``f32[head_dim, QUERIES]`` for each group of values: probabilities times scales, times all codes."""


class Ring(NamedTuple):
    """A program's line of the work, and its blocks on their way through shared memory."""

    row: Array
    first: Array  # block of the row
    blocks: Array
    length: Array  # KVs of the row
    place: Array  # of the row's first block among those of all rows
    pool_ref: Any  # u32[blocks, rows, 128]
    table_ref: Any  # i32[rows, max_blocks]
    words_smem: Any  # u32[stages, rows held, 128]
    arrived: Any
    rows: int  # to be read
    from_right: bool

    @classmethod
    def of_program(cls, work_ref: Any, *rest: Any) -> Ring:
        segment = lax.axis_index("segment")
        return cls(*(work_ref[segment, i] for i in range(5)), *rest)

    def begin(self) -> None:
        """Starts the copies of the first blocks."""
        ahead = [self._block(jnp.int32(k)) for k in range(self.words_smem.shape[0])]
        for k, block in enumerate(ahead):
            pl.when(k < self.blocks)(lambda k=k, block=block: self._fetch(jnp.int32(k), block))

    def stream(self, attend: Callable[[Array, Array, Softmax], Softmax], softmax: Softmax) -> Softmax:
        """``attend(block, slot, softmax)`` over the blocks: which one of the row, and its stage."""
        stages = self.words_smem.shape[0]

        def step(k: Array, softmax: Softmax) -> Softmax:
            slot = lax.rem(k, jnp.int32(stages))
            block = self._block(k + stages)  # looked up while this one is on its way
            plgpu.barrier_wait(self.arrived.at[slot])
            softmax = attend(self.first + k, slot, softmax)
            pl.when(k + stages < self.blocks)(lambda: self._fetch(k + stages, block))
            return softmax

        return lax.fori_loop(0, self.blocks, step, softmax)

    def _block(self, k: Array) -> Array:
        """Where the ``k``-th block lies, and anything where there is none."""
        last = self.table_ref.shape[1] - 1
        column = jnp.minimum(self.first + k, last)
        return self.table_ref[self.row, last - column if self.from_right else column]

    def _fetch(self, k: Array, block: Array) -> None:
        slot, rows = lax.rem(k, jnp.int32(self.words_smem.shape[0])), pl.ds(0, self.rows)
        plgpu.copy_gmem_to_smem(self.pool_ref.at[block, rows], self.words_smem.at[slot, rows], self.arrived.at[slot])


def segment_kernel(tier: Segments, head_dim: int, parts: int, from_right: bool, interpret: bool) -> Callable[..., None]:
    """One segment: partial output, maximum (base 2) and sum, and where it is asked for the logits."""
    fmt = tier.format
    more = [EXPONENT if parts == 1 and bits < 8 else 0 for bits in (fmt.key_bits, fmt.value_bits)]  # than codes
    scale = head_dim**-0.5 * math.log2(math.e)  # powers of two are one instruction each

    def across(x: Array, length: int) -> Array:
        """A value a query, repeated down so many rows."""
        return laid(lax.broadcast_in_dim(x, (length, QUERIES), (1,)), LAYOUT, interpret)

    def kernel(
        q_ref: Any,  # bf16[rows, key groups * parts, QUERIES, head_dim], zero outside the group
        sums_ref: Any,  # f32[rows, key groups, QUERIES] of the queries' values
        pool_ref: Any,  # u32[blocks, rows, 128]
        table_ref: Any,  # i32[rows, max_blocks]
        work_ref: Any,  # i32[segments, 5]
        out_ref: Any,  # f32[segments, head_dim, QUERIES]
        max_ref: Any,  # f32[segments, QUERIES]
        sum_ref: Any,  # f32[segments, QUERIES]
        *rest: Any,  # f32[blocks of all rows, tiles * 64, QUERIES] logits, if observed; then scratch
    ) -> None:
        *logits_ref, words_smem, arrived, q_smem, p_smem, q_arrived = rest
        part = Ring.of_program(work_ref, pool_ref, table_ref, words_smem, arrived, rows_read(tier), from_right)

        def attend(sums: list[Array], block: Array, slot: Array, i: Array, softmax: Softmax) -> Softmax:
            """64 tokens of a block."""
            words = words_smem.at[slot]

            def codes(start: int, axis: int, bits: int) -> Array:
                return read(words, i, tier, start, bits, head_dim, interpret, axis=axis, exact=parts > 1)

            def meta(start: int, group: int) -> tuple[Array, Array]:
                at = start + group * tier.tokens + token
                return unpack_meta(gather(words, at, LAYOUT, interpret))

            token = token_of(i * ROWS + iota((ROWS, QUERIES), 0, interpret), tier)
            held = (token < tier.tokens) & (block * tier.tokens + token < part.length)
            token = jnp.minimum(token, tier.tokens - 1)
            key = codes(0, 0, fmt.key_bits)
            logits = jnp.zeros((ROWS, QUERIES), jnp.float32)
            for group in range(fmt.key_groups):
                dots = laid(jnp.zeros((ROWS, QUERIES), jnp.float32), LAYOUT, interpret)
                for k in range(parts):
                    dots = product(key, q_smem.at[group * parts + k], interpret, transpose="b", start=dots)
                factor, low = meta(tier.key_meta, group)
                logits += dots * factor + across(sums[group], ROWS) * (low - more[0] * factor)
            logits = jnp.where(held, logits * scale, MASKED)
            for ref in logits_ref:
                store(ref.at[part.place + block, pl.ds(i * ROWS, ROWS)], logits, interpret)

            maximum = jnp.maximum(softmax.maximum, jnp.max(logits, axis=0))
            decay = jnp.exp2(softmax.maximum - maximum)
            p = jnp.where(held, jnp.exp2(logits - across(maximum, ROWS)), 0.0)
            minima = []
            for group in range(fmt.value_groups):
                # A freed block keeps its old bytes, and 0 * NaN is NaN.
                factor, low = (jnp.where(held, x, 0.0) for x in meta(tier.value_meta, group))
                scaled = split(p * factor, parts)
                least = p * low
                if more[1]:  # as rounded: most of it cancels
                    least -= scaled[0].astype(jnp.float32) * more[1]
                minima.append(softmax.minima[group] * across(decay, ROWS) + least)
                for k, weights in enumerate(scaled):
                    target = p_smem.at[group * parts + k]
                    if interpret:
                        target[...] = weights.T
                    else:
                        weights = plgpu.layout_cast(weights, plgpu.Layout.WGMMA_TRANSPOSED)
                        target.transpose((1, 0))[...] = weights
            plgpu.commit_smem()
            value = codes(tier.value, 1, fmt.value_bits)
            output = [x * across(decay, head_dim) for x in softmax.output]
            for group in range(fmt.value_groups):
                for k in range(parts):
                    weights = p_smem.at[group * parts + k]
                    output[group] = product(value, weights, interpret, transpose="b", start=output[group])
            return Softmax(maximum, softmax.total * across(decay, ROWS) + p, minima, output)

        @pl.when(part.blocks > 0)
        def _():
            segment = lax.axis_index("segment")
            plgpu.copy_gmem_to_smem(q_ref.at[part.row], q_smem, q_arrived)
            part.begin()
            plgpu.barrier_wait(q_arrived)
            by_query = LAYOUT.reduce(0)
            sums = [load(sums_ref.at[part.row, group], by_query, interpret) for group in range(fmt.key_groups)]

            def zeros(length: int) -> Array:
                return laid(jnp.zeros((length, QUERIES), jnp.float32), LAYOUT, interpret)

            def over(block: Array, slot: Array, softmax: Softmax) -> Softmax:
                return lax.fori_loop(0, tiles(tier), lambda i, s: attend(sums, block, slot, i, s), softmax)

            groups = range(fmt.value_groups)
            maximum = laid(jnp.full((QUERIES,), MASKED, jnp.float32), by_query, interpret)
            softmax = Softmax(maximum, zeros(ROWS), [zeros(ROWS) for _ in groups], [zeros(head_dim) for _ in groups])
            softmax = part.stream(over, softmax)
            store(max_ref.at[segment], softmax.maximum, interpret)
            store(sum_ref.at[segment], jnp.sum(softmax.total, axis=0), interpret)
            output = zeros(head_dim)
            group_of = lax.div(iota((head_dim, QUERIES), 0, interpret), jnp.int32(head_dim // fmt.value_groups))
            for group in groups:
                mine = softmax.output[group] + across(jnp.sum(softmax.minima[group], axis=0), head_dim)
                output = jnp.where(group_of == group, mine, output)
            store(out_ref.at[segment], output, interpret)

    return kernel
