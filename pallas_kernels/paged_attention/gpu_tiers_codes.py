"""Codes of quantised blocks as the tensor cores of an NVIDIA GPU take them: the left operand, in registers.

A word's halves are two tokens, and so are a register's where tokens lie across (V): it is the word, shifted and masked.
Where they lie down (K) a register has two lanes of one token: halves of two words. Under the exponent of 128 a code of
less than 8 bits is 128 and the code in bfloat16, with no conversion.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.gpu_warpgroup import ROWS, gather
from pallas_kernels.quantised_block.layout import LANES, Segments

EXPONENT = 128
"""Of which codes are what its fraction adds."""


class Place(NamedTuple):
    """Where the token of a tile's row is: a vector of words of the tier's narrower codes, one of their places in a
    half of a word, and the half. Of integers of any kind."""

    vector: Any
    slot: Any
    half: Any


def narrow(tier: Segments) -> int:
    """Bits of K's or of V's codes, whichever has fewer."""
    return min(tier.format.key_bits, tier.format.value_bits)


def vectors(tier: Segments) -> int:
    """Vectors of words in a block that hold the narrower codes."""
    return tier.tokens * narrow(tier) // 32


def tile_vectors(tier: Segments) -> int:
    """Of them, those of a tile of 64 tokens."""
    return ROWS * narrow(tier) // 32


def tiles(tier: Segments) -> int:
    """Tiles of 64 tokens in a block, the last one part-filled."""
    return -(-vectors(tier) // tile_vectors(tier))


def place_of(row: Any, tier: Segments) -> Place:
    """Of a tile's row; halves follow each other, then vectors, then what else their words hold."""
    pair, count = row // 2, tile_vectors(tier)
    slot = pair // count
    if count == 4 and tier.format.key_bits == 2 * tier.format.value_bits:
        slot = slot // 4 * 4 + slot % 2 * 2 + slot // 2 % 2  # so a thread's two rows are of the same words of K
    return Place(pair % count, slot, row % 2)


def token_of(row: Any, tier: Segments) -> Any:
    """Which token of a block is the ``row``-th of its tiles; past its end where the row is none."""
    place = place_of(row % ROWS, tier)
    vector = row // ROWS * tile_vectors(tier) + place.vector
    a_side = tier.tokens // tier.sides
    side, pair = vector % tier.sides, vector // tier.sides
    token = side * a_side + place.slot * (a_side * narrow(tier) // 16) + pair * 2 + place.half
    return token + (vector >= vectors(tier)) * tier.tokens


def locate(place: Place, tier: Segments, bits: int) -> tuple[Any, Any]:
    """As ``blocks.locate`` of one of a tile's tokens: the vector of words in the tile, and how far its code is shifted
    within its half."""
    ratio = bits // narrow(tier)
    return place.slot % ratio * vectors(tier) + place.vector, place.slot // ratio * bits


def rows_held(tier: Segments, head_dim: int) -> int:
    """Rows of shared memory for a block: where the last tile is part-filled, its other tokens must be somewhere."""
    past = (tiles(tier) * tile_vectors(tier) - vectors(tier)) * head_dim
    return max(-(-tier.scores // LANES), -(-(tier.key_meta + past) // LANES))


def read(
    words: Any,
    tile: Array,
    tier: Segments,
    start: int,
    bits: int,
    head_dim: int,
    interpret: bool,
    *,
    axis: int,
    exact: bool,
) -> Array:
    """Codes of a tile, bfloat16, and ``EXPONENT`` if they have less than 8 bits.

    Args:
      words: reference of a block's words.
      tile: which one.
      tier: what lies where in the block.
      start: of K's or of V's words.
      bits: of its codes.
      head_dim: values of a vector.
      interpret: whether the interpreter runs it.
      axis: along which the tokens lie: 0 ``[64, head_dim]``, 1 ``[head_dim, 64]``.
      exact: the codes alone.
    """
    shape = (ROWS, head_dim) if axis == 0 else (head_dim, ROWS)
    row = tile * (tile_vectors(tier) * head_dim // LANES)
    if interpret:
        place = place_of(lax.broadcasted_iota(jnp.int32, shape, axis), tier)
        at, shift = locate(place, tier, bits)
        found = gather(words, row * LANES + start + at * head_dim, None, True, axis=1 - axis)
        codes = found >> (place.half * 16 + shift).astype(jnp.uint32) & jnp.uint32(2**bits - 1)
        return (codes.astype(jnp.int32) + (0 if exact or bits == 8 else EXPONENT)).astype(jnp.bfloat16)

    def registers(_: Any, ref: ir.Value) -> FragmentedArray:
        thread, found = _Thread(ref, tier, start, bits, head_dim), np.empty(WGMMA_LAYOUT.registers_shape(shape), object)
        for index in np.ndindex(found.shape):
            big, across, small = index[0], index[1], index[4]
            pair = thread.lanes(small, across) if axis == 0 else thread.tokens(big, small, across)
            found[index] = _as_bfloat16(*pair, bits, exact)
        return FragmentedArray(_registers=found, _layout=WGMMA_LAYOUT, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    return inline(registers)(words.at[pl.ds(row, 1)])


class _Thread:
    """What a thread reads for its registers; integers are 32 bits."""

    def __init__(self, words: ir.Value, tier: Segments, start: int, bits: int, head_dim: int):
        self.tier, self.start, self.bits, self.head_dim = tier, start, bits, head_dim
        self.words = utils.memref_ptr(words)
        thread = utils.thread_idx()
        self.warp, self.lane = _Int(thread) // 32 % 4, _Int(thread) % 32

    def tokens(self, big: int, small: int, across: int) -> tuple[_Int, _Int]:
        """Of a value two tokens, 16 bits apart, and how far they are shifted."""
        row = self.lane % 4 * 2 + across * 8
        value = self.warp * 16 + self.lane // 4 + (big * 64 + small * 8)
        vector, shift = locate(place_of(row, self.tier), self.tier, self.bits)
        return self._load(vector * self.head_dim + value), shift

    def lanes(self, small: int, across: int) -> tuple[_Int, _Int]:
        """Of a token two values, 16 bits apart, and how far they are shifted."""
        row = self.warp * 16 + self.lane // 4 + small * 8
        place = place_of(row, self.tier)
        vector, shift = locate(place, self.tier, self.bits)
        at = vector * self.head_dim + self.lane % 4 * 2 + across * 8
        halves = place.half * 0x2222 + 0x5410
        return _Int(utils.prmt(self._load(at).value, self._load(at + 1).value, halves.value)), shift

    def _load(self, at: _Int) -> _Int:
        i32 = ir.IntegerType.get_signless(32)
        return _Int(llvm.load(i32, utils.getelementptr(self.words, [(at + self.start).value], i32)))


class _Int:
    """A number of 32 bits that is known as the kernel runs, not negative; the other operand is known before."""

    def __init__(self, value: ir.Value):
        self.value = value

    def __add__(self, other: _Int | int) -> _Int:
        return _Int(arith.addi(self.value, _word(other)))

    def __mul__(self, other: int) -> _Int:
        return _Int(arith.muli(self.value, _word(other)))

    def __floordiv__(self, other: int) -> _Int:
        return _Int(arith.divui(self.value, _word(other)))

    def __mod__(self, other: int) -> _Int:
        return _Int(arith.remui(self.value, _word(other)))

    def __rshift__(self, other: _Int) -> _Int:
        return _Int(arith.shrui(self.value, _word(other)))

    def __and__(self, other: int) -> _Int:
        return _Int(arith.andi(self.value, _word(other)))

    def __or__(self, other: int) -> _Int:
        return _Int(arith.ori(self.value, _word(other)))

    def as_type(self, kind: ir.Type) -> ir.Value:
        """The same bits."""
        return utils.bitcast(self.value, kind)


def _word(x: _Int | int) -> ir.Value:
    return x.value if isinstance(x, _Int) else utils.c(x, ir.IntegerType.get_signless(32))


def _as_bfloat16(pair: _Int, shift: _Int, bits: int, exact: bool) -> ir.Value:
    """Codes 16 bits apart as two numbers."""
    numbers = ir.VectorType.get((2,), ir.BF16Type.get())
    pair, mask = pair >> shift, (2**bits - 1) * 0x10001
    if bits == 8:  # below the exponent of 2**23, float32 is the code more
        codes, f32 = pair & mask, ir.F32Type.get()
        found = [(x | 0x4B000000).as_type(f32) for x in (codes & 255, codes // 2**16)]
        found = [arith.subf(x, utils.c(2.0**23, f32)) for x in found]
        both = vector.from_elements(ir.VectorType.get((2,), f32), found)
        return arith.truncf(numbers, both)
    # One instruction, of which the compiler makes two.
    words, i32 = [_word(x) for x in (pair, mask, 0x43004300)], ir.IntegerType.get_signless(32)
    found = llvm.InlineAsmOp(i32, words, "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r").result
    found = _Int(found).as_type(numbers)
    if exact:
        one = utils.c(float(EXPONENT), ir.BF16Type.get())
        found = arith.subf(found, vector.broadcast(numbers, one))
    return found
