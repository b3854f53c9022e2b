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
from pallas_kernels.tpu_tiles import TileStream, Tiling
from pallas_kernels.tpu_values import MASKED, ceil_div, product

WIDE = 256
"""Tokens of a product: so wide are the newest TPUs' matrix units."""
CHUNK = 8
"""Pieces of so many tokens that wait for each other's maximum: enough to hide the time that one takes."""


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

    def places(self, tile: Array, shape: tuple[int, ...], per_tile: int, side: int) -> Array:
        """``i32[blocks, ..., tokens of a side]``: which KV of the tier each is; as many as there are, or less than 0,
        where it is no KV."""
        block = tile * per_tile + lax.broadcasted_iota(jnp.int32, shape, 0)
        if self.is_low:  # from the right: the last block comes first
            block = self.blocks - 1 - block
        token = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        return block * self.tier.tokens + side * (self.tier.tokens // self.tier.sides) + token

    def left(self, block: Array, side: int) -> Array:
        """How many of a side's tokens of one of the stream's blocks are KVs, if they are fewer than all."""
        if self.is_low:
            block = self.blocks - 1 - block
        first = block * self.tier.tokens + side * (self.tier.tokens // self.tier.sides)
        return jnp.where(block < 0, 0, self.length - first)

    def held(self, places: Array) -> Array:
        return (places >= 0) & (places < self.length)


class Softmax(NamedTuple):
    """Of some of a row's KVs: maximum and sum ``[group, 1]``, output ``[group, 128]`` not yet divided by the sum."""

    maximum: Array
    total: Array
    output: Array


def join(a: Softmax, b: Softmax) -> Softmax:
    """That of the KVs of both."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    of_a, of_b = jnp.exp(a.maximum - maximum), jnp.exp(b.maximum - maximum)
    return Softmax(maximum, a.total * of_a + b.total * of_b, a.output * of_a + b.output * of_b)


Keep = Callable[[Array, Array, range, list[Array]], None]


class Factors(NamedTuple):
    """By which codes are multiplied, and what is added, ``f32[blocks, tokens of a side]`` each."""

    scale: Array
    low: Array

    def of(self, blocks: range) -> tuple[Array, Array]:
        """Of some blocks, beside each other: ``[1, n]`` each."""
        scale, low = (jnp.concatenate([x[block : block + 1] for block in blocks], axis=1) for x in self)
        return scale, low


class Carry(NamedTuple):
    """A softmax in progress: a part of ``output``, ``[rows, 128]``, for each group of values and side."""

    maximum: Array
    total: Array
    output: Array


class Attention:
    """Inside a kernel: the softmax of a query group over its head's KVs of one tier.

    Blocks that make a product as wide as the matrix unit are a piece, pieces that wait for each other's maximum a
    chunk. Logits of the next chunk are asked for before this one's are used, so that the units don't wait.
    """

    def __init__(self, stream: BlockStream, kvs: KVs, query: Array, head_dim: int, dtype: Any, keep: Keep | None):
        """
        Args:
          stream: whose next tiles are these.
          kvs: which they are.
          query: ``f32[group, 128]``, zero past the head dimension.
          head_dim: 64 or 128.
          dtype: of what goes to the matrix unit.
          keep: is given each tile, its buffer's slot, some of its blocks and their logits of each side,
            ``f32[group, tokens of a side of these blocks]``.
        """
        self.stream, self.kvs, self.keep = stream, kvs, keep
        self.group, self.head_dim, self.dtype = query.shape[0], head_dim, dtype
        tier, fmt = kvs.tier, kvs.tier.format
        self.a_side, self.sides = tier.tokens // tier.sides, range(tier.sides)
        keys = [
            jnp.where(_lanes(query.shape, side, part, fmt.key_groups, head_dim), _turn(query, side, head_dim), 0.0)
            for part in range(fmt.key_groups)
            for side in self.sides
        ]
        self.key_sums = [key.sum(-1, keepdims=True) for key in keys]
        self.keys = jnp.concatenate(keys).astype(dtype)

    def run(self) -> Softmax:
        """Over all of the tier's tiles."""
        tier, fmt, group = self.kvs.tier, self.kvs.tier.format, self.group
        rows = fmt.value_groups * tier.sides * group
        start = Carry(jnp.full((group, 1), MASKED), jnp.zeros((group, 1)), jnp.zeros((rows, LANES)))
        maximum, total, outputs = lax.fori_loop(0, self.stream.tiles(self.kvs.item)[1], self._tile, start)
        output = jnp.zeros((group, LANES))
        for part in range(fmt.value_groups):
            for side in self.sides:
                at = (part * tier.sides + side) * group
                own = _lanes(output.shape, side, part, fmt.value_groups, self.head_dim)
                output += _turn(jnp.where(own, outputs[at : at + group], 0.0), side, self.head_dim)
        return Softmax(maximum, total, output)

    def _tile(self, tile: Array, carry: Carry) -> Carry:
        slot, blocks = self.stream.take(self.kvs.item, tile), self.stream.tiling.blocks
        left = self.kvs.blocks - tile * blocks

        def first(blocks: int, smaller: list[int]) -> Carry:
            """Or fewer, if there aren't so many: a compressed head may be shorter than a tile."""
            if not smaller:
                return self._over(blocks, tile, slot, carry)
            few, *rest = smaller
            whole = partial(self._over, blocks, tile, slot, carry)
            return lax.cond(left <= few, lambda: first(few, rest), whole)

        return first(blocks, [few for few in (blocks // 2, blocks // 4) if few])

    def _over(self, blocks: int, tile: Array, slot: Array, carry: Carry) -> Carry:
        """The tile's first so many blocks into the softmax."""
        factors = self._factors(blocks, tile, slot)
        together = max(1, WIDE // self.a_side) if self.a_side % LANES == 0 else 1
        pieces = [range(k, min(k + together, blocks)) for k in range(0, blocks, together)]
        chunks = [pieces[k : k + CHUNK] for k in range(0, len(pieces), CHUNK)]
        dots = self._dots(slot, chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], []], strict=True):
            ahead = self._dots(slot, following)
            logits = [self._logits(tile, slot, *each, factors[0]) for each in zip(chunk, dots, strict=True)]
            carry, dots = self._add(slot, chunk, logits, factors[1], carry), ahead
        return carry

    def _factors(self, blocks: int, tile: Array, slot: Array) -> tuple[list[Factors], list[Factors]]:
        """Of K, for logits, and of V, for each of their groups and sides."""
        tier, fmt = self.kvs.tier, self.kvs.tier.format
        first = tier.key_meta // LANES // SUBLANES * SUBLANES
        words = self.stream.buffer[slot, slice(0, blocks), slice(first, -(-tier.scores // LANES))]

        def meta(start: int, part: int, side: int) -> Array:
            return line(words, start - first * LANES + part * tier.tokens + side * self.a_side, self.a_side)[:, 0]

        of_keys, of_values = [], []
        for part in range(fmt.key_groups):
            for side in self.sides:
                scale, low = (x * self.head_dim**-0.5 for x in halves(meta(tier.key_meta, part, side)))
                of_keys.append(Factors(scale, low - offset(fmt.key_bits, self.dtype) * scale))
        for part in range(fmt.value_groups):
            for side in self.sides:
                places = self.kvs.places(tile, (blocks, self.a_side), self.stream.tiling.blocks, side)
                # A freed block keeps its old bytes, and 0 * NaN is NaN.
                held = jnp.where(self.kvs.held(places), meta(tier.value_meta, part, side), jnp.uint32(0))
                of_values.append(Factors(*halves(held)))
        return of_keys, of_values

    def _codes(self, slot: Array, piece: range, start: int, end: int, bits: int) -> Array:
        """Those of all tokens of some blocks, ``[tokens, 128]``, and ``offset``."""
        words = self.stream.buffer[slot, slice(piece.start, piece.stop), slice(start // LANES, end // LANES)]
        return unpack(words, bits, self.dtype).reshape(-1, LANES)

    def _dots(self, slot: Array, chunk: list[range]) -> list[Array]:
        """Of each piece the products of its K codes with the query."""
        tier = self.kvs.tier
        return [
            product(self.keys, self._codes(slot, piece, 0, tier.value, tier.format.key_bits), (1, 1)) for piece in chunk
        ]

    def _logits(self, tile: Array, slot: Array, piece: range, dots: Array, factors: list[Factors]) -> list[Array]:
        """Of each side, ``f32[group, tokens]``."""
        found = []
        for side in self.sides:
            parts = []
            for index in range(side, len(factors), len(self.sides)):
                scale, low = factors[index].of(piece)
                parts.append(dots[index * self.group : (index + 1) * self.group] * scale + self.key_sums[index] * low)
            left = [self.kvs.left(tile * self.stream.tiling.blocks + block, side) for block in piece]
            found.append(_masked(reduce(jnp.add, parts), left))
        if self.keep:
            self.keep(tile, slot, piece, found)
        return found

    def _add(
        self, slot: Array, chunk: list[range], logits: list[list[Array]], factors: list[Factors], carry: Carry
    ) -> Carry:
        """The softmax with a chunk in it; ``logits`` of each piece and side."""
        tier, fmt = self.kvs.tier, self.kvs.tier.format
        highest = _over_lanes(jnp.maximum, [s for of_piece in logits for s in of_piece]).max(-1, keepdims=True)
        maximum = jnp.maximum(carry.maximum, highest)
        decay = jnp.exp(carry.maximum - maximum)
        weights = [[jnp.exp(s - maximum) for s in of_piece] for of_piece in logits]
        total = _over_lanes(jnp.add, [p for of_piece in weights for p in of_piece]).sum(-1, keepdims=True)
        outputs, minima = [], [[] for _ in factors]
        for piece, of_piece in zip(chunk, weights, strict=True):
            scaled = []
            for index, factor in enumerate(factors):
                p, (scale, low) = of_piece[index % tier.sides], factor.of(piece)
                scaled.append((p * scale).astype(self.dtype))
                # As they were rounded: most of it cancels.
                minima[index].append(p * low - offset(fmt.value_bits, self.dtype) * scaled[-1].astype(jnp.float32))
            codes = self._codes(slot, piece, tier.value, tier.key_meta, fmt.value_bits)
            outputs.append(product(jnp.concatenate(scaled), codes, (1, 0)))
        least = jnp.concatenate([_over_lanes(jnp.add, parts).sum(-1, keepdims=True) for parts in minima])
        output = carry.output * jnp.concatenate([decay] * len(minima)) + reduce(jnp.add, outputs) + least
        return Carry(maximum, carry.total * decay + total, output)


def _lanes(shape: tuple[int, ...], side: int, part: int, parts: int, head_dim: int) -> Array:
    """Where a side's vector has its ``part``-th of so many parts."""
    width = head_dim // parts
    lane = lax.broadcasted_iota(jnp.int32, shape, 1) - (side * head_dim + part * width)
    return (lane >= 0) & (lane < width)


def _turn(x: Array, side: int, head_dim: int) -> Array:
    """From the first side's lanes to another's, or back."""
    return pltpu.roll(x, side * head_dim, axis=1) if side else x


def _over_lanes(add: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    """Of arrays as wide as each other, but for the last one, so wide: what they have in each lane."""
    *whole, last = parts
    if whole and last.shape != whole[0].shape:
        return jnp.concatenate([reduce(add, whole), last], axis=1)
    return reduce(add, parts)


def _masked(logits: Array, left: list[Array]) -> Array:
    """Logits of as many blocks, but for the first so many of each that which are no KVs."""
    tokens = logits.shape[1] // len(left)
    lane = lax.broadcasted_iota(jnp.int32, (logits.shape[0], tokens), 1)
    parts = (logits[:, k * tokens : (k + 1) * tokens] for k in range(len(left)))
    return jnp.concatenate([jnp.where(lane < n, part, MASKED) for part, n in zip(parts, left, strict=True)], axis=1)
