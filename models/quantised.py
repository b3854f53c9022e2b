"""Weight matrices as codes with scales, which stay so in memory and are widened inside the matrix product.

A scale that a whole output shares is applied to the product: the codes meet the inputs as they are. Where groups of
inputs or blocks have scales of their own, they are applied to the codes, some outputs at a time, so that no program
holds a widened matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike

__all__ = ["CODES", "Grouped", "Packed", "Quantised", "Scaled", "in_bits", "quantise", "widened"]

CODES: dict[str, tuple[Any, float]] = {"int8": (np.dtype(np.int8), 127.0), "fp8": (jnp.dtype(jnp.float8_e4m3fn), 448.0)}
"""What weights can be quantised to at load, by name: the codes' dtype and their largest magnitude."""
_PART = 2**22
"""Values of a matrix that are widened at a time: small enough for a TPU's or GPU's memory on the chip."""


def static(**options: Any) -> Any:
    """A dataclass field that is no array."""
    return field(metadata={"static": True}, **options)


@register_dataclass
@dataclass(frozen=True, kw_only=True)
class Packed:
    """Codes of 4, 5 or 6 bits: low nibbles and, of more than 4 bits, what is above them, in bytes.

    A byte holds bits of codes that are far apart, so that unpacking is shifts, masks and a concatenation: with n codes
    a byte, byte r holds codes r, r + inputs/n, ..., the first in its lowest bits.
    """

    low: Any
    """``u8``, two codes a byte along ``axis``."""
    high: Any = None
    """``u8``, 8 or 4 codes a byte along ``axis``: the fifth bits, or the fifth and sixth; None: there are none."""
    axis: int = static()
    """Along which codes are packed: the inputs' axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        packed = self.axis + self.low.ndim - 2  # where an axis of layers stands before the matrix's
        return tuple(n * 2 if axis == packed else n for axis, n in enumerate(self.low.shape))

    @classmethod
    def of(cls, codes: np.ndarray, *, bits: int, axis: int) -> Packed:
        """Packs ``u8`` codes below ``2**bits``; their number along the axis must be a multiple of 8."""
        high = _packed(codes >> 4, bits - 4, axis) if bits > 4 else None
        return cls(low=_packed(codes & 15, 4, axis), high=high, axis=axis)

    def unpacked(self) -> Array:
        """``u8``, of ``shape``."""
        codes = _unpacked(self.low, 4, self.axis)
        return codes if self.high is None else codes | (_unpacked(self.high, self._high_bits, self.axis) << 4)

    def in_parts(self, count: int) -> Packed:
        """With each of so many equal parts along the axis packed by itself, one after the other; also where an axis of
        layers stands before the two of the matrix."""
        axis = self.axis + self.low.ndim - 2

        def again(data: Any, bits: int) -> Array:
            parts = jnp.split(_unpacked(data, bits, axis), count, axis)
            return jnp.concatenate([_packed(part, bits, axis) for part in parts], axis)

        high = None if self.high is None else again(self.high, self._high_bits)
        return replace(self, low=again(self.low, 4), high=high)

    @property
    def _high_bits(self) -> int:
        axis = self.axis - 2
        return 4 * self.high.shape[axis] // self.low.shape[axis]


def in_bits(codes: np.ndarray, bits: int, *, axis: int) -> np.ndarray | Packed:
    """Codes as a matrix holds them, in their bits; those of 8 as they are."""
    return Packed.of(codes, bits=bits, axis=axis) if bits < 8 else codes


def _packed(codes: Any, bits: int, axis: int) -> Any:
    """NumPy's or JAX's ``u8`` codes in bytes."""
    size = codes.shape[axis] * bits // 8
    parts = [codes[(slice(None),) * axis + (slice(n * size, (n + 1) * size),)] for n in range(8 // bits)]
    return reduce(or_, [part << np.uint8(bits * n) for n, part in enumerate(parts)])


def _unpacked(data: Any, bits: int, axis: int) -> Array:
    mask = (1 << bits) - 1
    return jnp.concatenate([(data >> shift) & mask for shift in range(0, 8, bits)], axis)


@dataclass(frozen=True, kw_only=True)
class Quantised(ABC):
    """A weight matrix that isn't held as floats; its arrays are NumPy's while it is loaded, and JAX's later.

    Indexing it, as ``nnx.Linear`` and ``nnx.Embed`` do, widens it. ``models.layers.Linear`` and ``Embed`` know better.
    """

    axis: int = static()
    """That of the inputs: 0 of a kernel ``[in, out]``, 1 of a table ``[out, in]``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int:
        return 2

    @property
    def outputs(self) -> int:
        return self.shape[1 - self.axis]

    def __getitem__(self, index: Any) -> Array:
        return self.widened()[index]

    @abstractmethod
    def widened(self) -> Array:
        """``f32``, of ``shape``."""

    @abstractmethod
    def product(self, x: Array, dtype: DTypeLike) -> Array:
        """``[..., out]`` from ``[..., in]``: computed in the dtype of ``x`` and summed in float32."""

    @abstractmethod
    def map_outputs(self, change: Callable[[Any, int], Any]) -> Quantised:
        """With each array that has an outputs' axis of more than 1 changed: ``change(array, block)``, where the array
        has one entry for so many outputs."""

    @abstractmethod
    def fault(self, shape: tuple[int, ...]) -> str | None:
        """What of its parts doesn't belong to a matrix of that shape; None: all do."""

    @abstractmethod
    def transposed(self) -> Quantised:
        """A kernel of a table, and the other way round; of NumPy's arrays."""

    def part(self, start: Any, size: int) -> Quantised:
        """Some of the outputs; where blocks span outputs, whole blocks."""
        across = 1 - self.axis

        def cut(array: Any, block: int) -> Any:
            if isinstance(array, np.ndarray):
                return array[(slice(None),) * across + (slice(start // block, -(-(start + size) // block)),)]
            return lax.dynamic_slice_in_dim(array, start // block, -(-size // block), across)

        return self.map_outputs(cut)

    def rows(self, ids: Array) -> Array:
        """``f32[..., in]`` of a table's rows."""
        if self.axis != 1:
            raise ValueError("rows can be looked up in tables [out, in] alone, this is a kernel [in, out]")
        flat = ids.reshape(-1)
        found = self.single_outputs(lambda array, block: jnp.take(array, flat // block, axis=0))
        return found.widened().reshape(*ids.shape, -1)

    @abstractmethod
    def single_outputs(self, change: Callable[[Any, int], Any]) -> Quantised:
        """As ``map_outputs``, after which each output has entries of its own."""


@register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scaled(Quantised):
    """One scale for each output, or for the whole matrix: ``code * scale``."""

    codes: Any
    """``[in, out]`` or ``[out, in]``: int8 or an 8-bit float."""
    scales: Any
    """``f32[1, out]`` or ``[out, 1]``, or of shape ``[1, 1]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def widened(self) -> Array:
        return jnp.asarray(self.codes).astype(jnp.float32) * self.scales

    def product(self, x: Array, dtype: DTypeLike) -> Array:
        return (_product(x, self.codes, self.axis) * self.scales.reshape(-1)).astype(dtype)

    def map_outputs(self, change: Callable[[Any, int], Any]) -> Scaled:
        scales = change(self.scales, 1) if self.scales.size > 1 else self.scales
        return replace(self, codes=change(self.codes, 1), scales=scales)

    single_outputs = map_outputs

    def fault(self, shape: tuple[int, ...]) -> str | None:
        if self.codes.shape != shape:
            return f"has codes of shape {self.codes.shape}, expected {shape}"
        each = (1, self.outputs) if self.axis == 0 else (self.outputs, 1)
        if self.scales.shape not in (each, (1, 1)):
            return f"has scales of shape {self.scales.shape}, expected one, or one for each of {self.outputs} outputs"
        return None

    def transposed(self) -> Scaled:
        return Scaled(axis=1 - self.axis, codes=_turned(self.codes), scales=_turned(self.scales))


@register_dataclass
@dataclass(frozen=True, kw_only=True)
class Grouped(Quantised):
    """A scale for each group of inputs or block of both: ``(code - zero) * scale + offset``.

    Scales and offsets may themselves be codes with scales.
    """

    codes: Any
    """``[in, out]`` or ``[out, in]``: whole numbers, 8-bit floats, or ``Packed``."""
    scales: Any
    """One a block, along both axes: floats, or ``Grouped``."""
    zeros: Any = None
    """Like scales, or of shape ``[1, 1]``: whole numbers; None: 0."""
    offsets: Any = None
    """Like scales; None: 0."""
    order: Any = None
    """``i32[in]``: code n along the inputs is that of input ``order[n]``; None: they stand in order."""
    block: tuple[int, int] = static()
    """How many codes share a scale along each axis; the last blocks may be cut."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def widened(self) -> Array:
        values = self._in_order_of_codes()
        return values if self.order is None else jnp.take(values, jnp.argsort(self.order), axis=self.axis)

    def _in_order_of_codes(self) -> Array:
        codes = self.codes.unpacked() if isinstance(self.codes, Packed) else jnp.asarray(self.codes)
        values = codes.astype(jnp.float32)
        if self.zeros is not None:
            values -= self._spread(self.zeros)
        values *= self._spread(self.scales)
        return values if self.offsets is None else values + self._spread(self.offsets)

    def _spread(self, entries: Any) -> Array:
        """An entry for each code."""
        entries = widened(entries)
        for axis, (size, block) in enumerate(zip(self.shape, self.block, strict=True)):
            if entries.shape[axis] > 1 and block > 1:
                entries = lax.slice_in_dim(jnp.repeat(entries, block, axis), 0, size, axis=axis)
        return entries

    def product(self, x: Array, dtype: DTypeLike) -> Array:
        if self.order is not None:
            x = jnp.take(x, self.order, axis=-1)
        stored = replace(self, order=None)
        block = self.block[1 - self.axis]
        step = max(_PART // self.shape[self.axis] // math.lcm(128, block), 1) * math.lcm(128, block)
        whole, rest = divmod(self.outputs, step)
        if whole + bool(rest) == 1:
            return _product(x, stored.widened(), self.axis).astype(dtype)

        def of_part(out: Array, start: Any, size: int) -> Array:
            made = _product(x, stored.part(start, size).widened(), self.axis).astype(dtype)
            return lax.dynamic_update_slice_in_dim(out, made, start, -1)

        out = jnp.zeros((*x.shape[:-1], self.outputs), dtype)
        out = lax.fori_loop(0, whole, lambda n, out: of_part(out, n * step, step), out)
        return of_part(out, whole * step, rest) if rest else out

    def map_outputs(self, change: Callable[[Any, int], Any]) -> Grouped:
        across, block = 1 - self.axis, self.block[1 - self.axis]

        def changed(entries: Any) -> Any:
            if isinstance(entries, Grouped):
                return entries.map_outputs(lambda array, inner: change(array, block * inner))
            return entries if entries is None or entries.shape[across] == 1 else change(entries, block)

        codes = self.codes
        if isinstance(codes, Packed):
            high = None if codes.high is None else change(codes.high, 1)
            codes = replace(codes, low=change(codes.low, 1), high=high)
        else:
            codes = change(codes, 1)
        rest = {name: changed(getattr(self, name)) for name in ("scales", "zeros", "offsets")}
        return replace(self, codes=codes, **rest)

    def single_outputs(self, change: Callable[[Any, int], Any]) -> Grouped:
        blocks = (self.block[0], 1) if self.axis == 0 else (1, self.block[1])
        return replace(self.map_outputs(change), block=blocks)

    def fault(self, shape: tuple[int, ...]) -> str | None:
        if self.codes.shape != shape:
            return f"has codes of shape {self.codes.shape}, expected {shape}"
        blocks = tuple(-(-size // block) for size, block in zip(shape, self.block, strict=True))
        for name in ("scales", "zeros", "offsets"):
            found = getattr(self, name)
            if isinstance(found, Grouped):
                if fault := found.fault(blocks):
                    return f"in its {name} {fault}"
            elif found is not None and found.shape not in (blocks, (1, 1)):
                return f"has {name} of shape {found.shape}, expected {blocks} for blocks of {self.block}"
        if self.order is not None and self.order.shape != (shape[self.axis],):
            return f"has an order of shape {self.order.shape}, expected ({shape[self.axis]},)"
        return None

    def transposed(self) -> Grouped:
        parts = {name: _turned(getattr(self, name)) for name in ("codes", "scales", "zeros", "offsets")}
        return replace(self, axis=1 - self.axis, block=self.block[::-1], **parts)


def _turned(values: Any) -> Any:
    """An array, or what is made of arrays, with its axes changed round."""
    if isinstance(values, Grouped):
        return values.transposed()
    if isinstance(values, Packed):
        return Packed(low=_turned(values.low), high=_turned(values.high), axis=1 - values.axis)
    return None if values is None else np.ascontiguousarray(values.T)


def widened(values: Any) -> Array:
    """In float32, whatever the values are."""
    return values.widened() if isinstance(values, Quantised) else jnp.asarray(values).astype(jnp.float32)


def _product(x: Array, matrix: Any, axis: int) -> Array:
    """``f32[..., out]`` from ``[..., in]`` and a matrix with its inputs along ``axis``, taken in the dtype of ``x``."""
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(x, matrix.astype(x.dtype), contracted, preferred_element_type=jnp.float32)


def quantise(values: np.ndarray, kind: str, *, axis: int) -> Scaled:
    """Finite floats as int8 or FP8 codes with a scale for each output, so that its largest value has the largest code.

    Args:
      values: ``[in, out]`` with ``axis`` 0, or ``[out, in]`` with ``axis`` 1.
      kind: of ``CODES``.
    """
    dtype, largest = CODES[kind]
    values = values.astype(np.float32)
    most = np.abs(values).max(axis, keepdims=True)
    scales = np.where(most > 0, most / np.float32(largest), np.float32(1)).astype(np.float32)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)  # a subnormal one may be flushed to zero
    codes = values / scales
    if dtype == np.int8:
        codes = np.rint(codes)
    return Scaled(axis=axis, codes=np.clip(codes, -largest, largest).astype(dtype), scales=scales)
