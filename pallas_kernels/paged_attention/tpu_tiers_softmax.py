"""The softmax of one query group over its head's blocks of one tier, in a TPU kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantised_block.layout import LANES, Segments
from pallas_kernels.quantised_block.tpu_vectors import SUBLANES, halves, line, offset, unpack
from pallas_kernels.tpu_tiles import MASKED, TileStream, Tiling, ceil_div


class BlockStream(TileStream):
    """Blocks side by side in buffers ``[blocks, rows, 128]``; tiles are counted from the first block of an item."""

    @staticmethod
    def scratch_shapes(tiling: Tiling, pool: Array) -> tuple[Any, Any, Any]:
        _, arrived, state = TileStream.scratch_shapes(tiling, pool)
        return pltpu.VMEM((tiling.buffers, tiling.blocks, *pool.shape[1:]), pool.dtype), arrived, state

    def tiles(self, item: Array) -> tuple[Array, Array]:
        first, end = self.span(item)
        return jnp.int32(0), ceil_div(end - first, self.tiling.blocks)

    def _origin(self, item: Array, tile: Array) -> Array:
        return self.span(item)[0] + tile * self.tiling.blocks

    def _entries(self, item: Array, tile: Array) -> tuple[Array, Array]:
        first = self._origin(item, tile)
        return first, jnp.minimum(self.span(item)[1], first + self.tiling.blocks)

    def _block(self, slot: Array, index: Array) -> Any:
        return self.buffer.at[slot, index]


class KVs(NamedTuple):
    """A row's KVs in one tier: an item of the stream."""

    tier: Segments
    item: Array
    is_low: bool
    length: Array
    blocks: Array

    def places(self, tile: Array, blocks: int, per_tile: int, side: int) -> Array:
        """``i32[blocks, 1, tokens of a side]``: which KV of the tier each is; as many as there are, or less than none,
        where it is no KV."""
        a_side = self.tier.tokens // self.tier.sides
        shape = (blocks, 1, a_side)
        block = tile * per_tile + lax.broadcasted_iota(jnp.int32, shape, 0)
        if self.is_low:  # from the right: the last block comes first
            block = self.blocks - 1 - block
        return block * self.tier.tokens + side * a_side + lax.broadcasted_iota(jnp.int32, shape, 2)

    def held(self, places: Array) -> Array:
        return (places >= 0) & (places < self.length)


class Softmax(NamedTuple):
    """Of some of a row's KVs: maximum and sum ``[group, 1]``, output ``[group, 128]`` not yet divided by the sum."""

    maximum: Array
    total: Array
    output: Array


def join(parts: list[Softmax]) -> Softmax:
    """That of all of these KVs."""

    def both(a: Softmax, b: Softmax) -> Softmax:
        maximum = jnp.maximum(a.maximum, b.maximum)
        of_a, of_b = jnp.exp(a.maximum - maximum), jnp.exp(b.maximum - maximum)
        return Softmax(maximum, a.total * of_a + b.total * of_b, a.output * of_a + b.output * of_b)

    return reduce(both, parts)


def attend(
    stream: BlockStream,
    kvs: KVs,
    query: Array,
    head_dim: int,
    dtype: Any,
    keep: Callable[[Array, Array, list[Array]], None] | None,
) -> Softmax:
    """The softmax over a tier's KVs.

    Args:
      stream: whose next tiles are these.
      kvs: which they are.
      query: ``f32[group, 128]``, zero past the head dimension.
      head_dim: 64 or 128.
      dtype: of what goes to the matrix unit.
      keep: is given each tile, its buffer's slot and the logits of each side, ``f32[blocks, group, tokens]``.
    """
    tier, fmt, buffer = kvs.tier, kvs.tier.format, stream.buffer
    per_tile, group = stream.tiling.blocks, query.shape[0]
    a_side, sides = tier.tokens // tier.sides, range(tier.sides)
    keys = jnp.concatenate(
        [
            jnp.where(_lanes(query.shape, side, part, fmt.key_groups, head_dim), _turn(query, side, head_dim), 0.0)
            for part in range(fmt.key_groups)
            for side in sides
        ]
    )
    key_sums = keys.sum(-1, keepdims=True)
    keys = keys.astype(dtype)
    key_offset, value_offset = (offset(bits, dtype) for bits in (fmt.key_bits, fmt.value_bits))
    meta_at = tier.key_meta // LANES // SUBLANES * SUBLANES

    def over(blocks: int, tile: Array, slot: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """The tile's first so many blocks into the running softmax."""
        maximum, total, output = carry
        first = [slot, slice(0, blocks)]
        scale, low = halves(buffer[(*first, slice(meta_at, -(-tier.scores // LANES)))])

        def values(meta: Array, start: int, part: int, side: int) -> Array:
            return line(meta, start - meta_at * LANES + part * tier.tokens + side * a_side, a_side)

        key = unpack(buffer[(*first, slice(0, tier.value // LANES))], fmt.key_bits, dtype)
        dots = _batched(jnp.broadcast_to(keys, (blocks, *keys.shape)), key, (2, 2))
        places = [kvs.places(tile, blocks, per_tile, side) for side in sides]
        held = [kvs.held(place) for place in places]
        logits = []
        for side in sides:
            s = jnp.zeros((blocks, group, a_side))
            for part in range(fmt.key_groups):
                rows = slice((part * tier.sides + side) * group, (part * tier.sides + side + 1) * group)
                factor, least = (values(meta, tier.key_meta, part, side) for meta in (scale, low))
                s += dots[:, rows] * factor + key_sums[rows] * (least - key_offset * factor)
            logits.append(jnp.where(held[side], s * head_dim**-0.5, MASKED))
        if keep:
            keep(tile, slot, logits)

        new = maximum
        for s in logits:
            new = jnp.maximum(new, s.max(0).max(-1, keepdims=True))
        decay = jnp.exp(maximum - new)
        weights = [jnp.exp(s - new) for s in logits]
        total = total * decay + sum(p.sum(0).sum(-1, keepdims=True) for p in weights)
        scaled, minima = [], []
        for part in range(fmt.value_groups):
            for side, p in enumerate(weights):
                # A freed block keeps its old bytes, and 0 * NaN is NaN.
                factor, least = (
                    jnp.where(held[side], values(meta, tier.value_meta, part, side), 0.0) for meta in (scale, low)
                )
                weight = (p * factor).astype(dtype)
                scaled.append(weight)
                least = p * least - value_offset * weight.astype(jnp.float32)  # as rounded: most of it cancels
                minima.append(least.sum(0).sum(-1, keepdims=True))
        words = buffer[(*first, slice(tier.value // LANES, tier.key_meta // LANES))]
        value = unpack(words, fmt.value_bits, dtype)
        out = _batched(jnp.concatenate(scaled, axis=1), value, (2, 1)).sum(0)
        decays = jnp.concatenate([decay] * len(minima))
        return new, total, output * decays + out + jnp.concatenate(minima)

    def step(tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slot = stream.take(kvs.item, tile)
        few = per_tile // 4  # a compressed head may be shorter than a tile
        if not few:
            return over(per_tile, tile, slot, carry)
        left = kvs.blocks - tile * per_tile
        return lax.cond(left <= few, partial(over, few, tile, slot), partial(over, per_tile, tile, slot), carry)

    rows = fmt.value_groups * tier.sides * group
    start = jnp.full((group, 1), MASKED), jnp.zeros((group, 1)), jnp.zeros((rows, LANES))
    maximum, total, outputs = lax.fori_loop(0, stream.tiles(kvs.item)[1], step, start)
    output = jnp.zeros((group, LANES))
    for part in range(fmt.value_groups):
        for side in sides:
            at = (part * tier.sides + side) * group
            own = _lanes(query.shape, side, part, fmt.value_groups, head_dim)
            output += _turn(jnp.where(own, outputs[at : at + group], 0.0), side, head_dim)
    return Softmax(maximum, total, output)


def _lanes(shape: tuple[int, ...], side: int, part: int, parts: int, head_dim: int) -> Array:
    """Where a side's vector has its ``part``-th of so many parts."""
    width = head_dim // parts
    lane = lax.broadcasted_iota(jnp.int32, shape, 1) - (side * head_dim + part * width)
    return (lane >= 0) & (lane < width)


def _turn(x: Array, side: int, head_dim: int) -> Array:
    """From the first side's lanes to another's, or back."""
    return pltpu.roll(x, side * head_dim, axis=1) if side else x


def _batched(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Products of matrices, summed in float32."""
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    axes = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
