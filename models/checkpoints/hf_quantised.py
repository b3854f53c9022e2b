"""Quantised layers of Hugging Face checkpoints: the tensors of each, and the matrix that they make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from models.checkpoints.compressed import Quantisation, Scheme
from models.errors import CheckpointError
from models.quantised import Grouped, Quantised, Scaled, in_bits

_FLOAT8 = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
_WEIGHTS = ("weight", "weight_packed", "qweight")
"""Tensors of which a layer has one."""
_BESIDE = (
    *("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("qzeros", "scales", "g_idx"),
)
_OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "input_zero_point", "activation_scale")
"""Which aren't quantised here."""
_OF_KVS = ("k_scale", "v_scale", "q_scale", "kv_scale", "output_scale", "k_zero_point", "v_zero_point")
_AWQ_COLUMNS = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""At which nibble of a word each of 8 columns is."""


class Tensors(Protocol):
    """A checkpoint's tensors as the file has them."""

    @property
    def origin(self) -> Path: ...

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def nbytes(self, name: str) -> int: ...

    def values(self, name: str) -> np.ndarray: ...


class QuantisedTensors:
    """A ``TensorSource`` over a file's tensors, in which each quantised layer is one tensor, ``….weight``.

    Whether a layer is quantised is what the file's dtypes and names say; the config tells how, and is checked by them.
    """

    def __init__(self, tensors: Tensors, quantisation: Quantisation):
        self.origin = tensors.origin
        self._tensors, self._quantisation = tensors, quantisation
        present = set(tensors.names())
        self._parts: dict[str, dict[str, str]] = {}  # of ….weight: the tensors by what they are
        hidden = set()
        for name in present:
            module, _, part = name.rpartition(".")
            if part in _WEIGHTS:
                parts = {each: f"{module}.{each}" for each in (*_WEIGHTS, *_BESIDE) if f"{module}.{each}" in present}
                if f"{module}.weight" in self._parts and len(set(_WEIGHTS) & parts.keys()) > 1:
                    raise CheckpointError(
                        f"{self.origin}: {module!r} has both {' and '.join(set(_WEIGHTS) & parts.keys())}, expected "
                        "one. Download the checkpoint again."
                    )
                self._parts[f"{module}.weight"] = parts
                hidden |= {*parts.values(), *(f"{module}.{each}" for each in _OF_ACTIVATIONS)}
        if skipped := {name for name in present if name.rpartition(".")[2] in _OF_KVS}:
            warnings.warn(
                f"{self.origin} has {len(skipped)} scales for keys and values, which aren't used: the cache quantises "
                "by itself",
                stacklevel=2,
            )
        self._names = {*(present - hidden - skipped), *self._parts}

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts.get(name, {})
        if "weight_packed" in parts:
            return tuple(int(n) for n in self._part(name, parts, "weight_shape").ravel()[:2])
        if "qweight" in parts:
            rows, columns = self._layer(name, parts).two("qweight")
            per_word = 32 // self._packed_scheme(name).bits
            return (columns * per_word, rows) if self._quantisation.method == "awq" else (columns, rows * per_word)
        return self._tensors.shape(name)

    def nbytes(self, name: str) -> int:
        parts = self._parts.get(name, {})
        return sum(map(self._tensors.nbytes, parts.values())) if parts else self._tensors.nbytes(name)

    def read(self, name: str, *, stored: bool) -> np.ndarray | Quantised:
        parts = self._parts.get(name, {})
        if not parts.keys() - {"weight"}:
            values = self._tensors.values(name)
            if parts and values.dtype in _FLOAT8:
                raise self._wrong(name, f"holds {values.dtype} without a scale beside it")
            return values
        module, layer = name.removesuffix(".weight"), self._layer(name, parts)
        if "weight" in parts:
            return _of_codes(layer, self._quantisation.scheme_of(module))
        if "weight_packed" in parts:
            return _of_packed(layer, self._packed_scheme(name), self.shape(name))
        if self._quantisation.method == "awq":
            return _of_awq(layer, self._packed_scheme(name), self.shape(name))
        return _of_gptq(layer, self._packed_scheme(name), self.shape(name), older=self._quantisation.older_zeros)

    def adds_nothing(self, name: str) -> bool:
        """Whether it is a bias of zeros beside packed integers: such files have one also where the model has none."""
        module, _, part = name.rpartition(".")
        if part != "bias" or "qweight" not in self._parts.get(f"{module}.weight", {}):
            return False
        return not np.asarray(self._tensors.values(name), np.float32).any()

    def _layer(self, name: str, parts: dict[str, str]) -> _Layer:
        return _Layer(
            names=parts, read=lambda part: self._part(name, parts, part), wrong=lambda found: self._wrong(name, found)
        )

    def _part(self, name: str, parts: dict[str, str], part: str) -> np.ndarray:
        if part not in parts:
            raise self._wrong(name, f"has {', '.join(parts)}, but no {part}")
        return self._tensors.values(parts[part])

    def _packed_scheme(self, name: str) -> Scheme:
        method, scheme = self._quantisation.method, self._quantisation.scheme_of(name.removesuffix(".weight"))
        packed = "weight_packed" in self._parts[name]
        if scheme is None or packed != (method == "compressed-tensors") or scheme.kind != "int":
            raise self._wrong(name, "holds packed integers, of which the config doesn't say what they mean")
        return scheme

    def _wrong(self, name: str, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.origin}: tensor {name!r} {found}. The checkpoint is incomplete, or its config isn't its own; "
            "download it again."
        )


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer's tensors."""

    names: dict[str, str]
    read: Callable[[str], np.ndarray]
    wrong: Callable[[str], CheckpointError]

    def two(self, part: str) -> tuple[int, int]:
        """The shape of a matrix."""
        shape = self.read(part).shape
        if len(shape) != 2:
            raise self.wrong(f"has a {part} of shape {shape}, expected a matrix")
        return shape

    def words(self, part: str, shape: tuple[int, ...]) -> np.ndarray:
        """``u32`` of that shape."""
        found = self.read(part)
        if found.dtype.kind not in "iu" or found.dtype.itemsize != 4 or found.shape != shape:
            raise self.wrong(f"has a {part} of {found.dtype}{list(found.shape)}, expected 32-bit words {list(shape)}")
        return np.ascontiguousarray(found).view(np.uint32)

    def floats(self, part: str) -> np.ndarray:
        found = self.read(part)
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise self.wrong(f"has a {part} of {found.dtype}, expected floats")
        return found


def _of_codes(layer: _Layer, scheme: Scheme | None) -> Quantised:
    """8-bit codes, one a byte, with a scale beside them."""
    codes = layer.read("weight")
    outputs, inputs = layer.two("weight")
    names = [part for part in ("weight_scale", "weight_scale_inv") if part in layer.names]
    if codes.dtype not in (*_FLOAT8, np.int8) or len(names) != 1:
        raise layer.wrong(f"holds {codes.dtype} beside {', '.join(layer.names) or 'nothing'}, expected one scale")
    if codes.dtype == np.int8 and (scheme is None or (scheme.kind, scheme.bits) != ("int", 8)):
        raise layer.wrong("holds int8, of which the config doesn't say what it means")
    if codes.dtype in _FLOAT8 and scheme is not None and scheme.kind != "float":
        raise layer.wrong(f"holds {codes.dtype}, where the config says {scheme.kind}")
    scales = layer.floats(names[0])
    zeros = layer.read("weight_zero_point") if "weight_zero_point" in layer.names and codes.dtype == np.int8 else None
    if zeros is None and scheme is not None and codes.dtype == np.int8 and not scheme.symmetric:
        raise layer.wrong("is asymmetric by its config, but has no weight_zero_point")
    strategy = _strategy(layer, scales, scheme, (outputs, inputs))
    if strategy in ("tensor", "channel") and zeros is None:
        scales = scales.astype(np.float32).reshape(-1, 1)
        return Scaled(axis=1, codes=codes, scales=scales)
    block = (1, inputs)
    if strategy == "tensor":
        block = outputs, inputs
    elif strategy != "channel" and scheme is not None:
        block = scheme.block if strategy == "block" and scheme.block else (1, scheme.group or inputs)
    blocks = -(-outputs // block[0]), -(-inputs // block[1])
    scales, zeros = (_shaped(layer, each, blocks) for each in (scales, zeros))
    return Grouped(axis=1, codes=codes, scales=scales, zeros=zeros, block=block)


def _shaped(layer: _Layer, values: Any, blocks: tuple[int, int]) -> Any:
    """``[out]`` as ``[out, 1]``, and one number as ``[1, 1]``."""
    if values is None:
        return None
    if values.size not in (1, blocks[0] * blocks[1]):
        raise layer.wrong(f"has scales or zero points of shape {values.shape}, expected {blocks}")
    return values.reshape(blocks if values.size > 1 else (1, 1))


def _strategy(layer: _Layer, scales: np.ndarray, scheme: Scheme | None, shape: tuple[int, int]) -> str:
    """What the scales' shape says, which must be what the config says, where it says something."""
    outputs, inputs = shape
    block = scheme.block if scheme is not None and scheme.block else None
    group = scheme.group if scheme is not None and scheme.group else inputs
    shapes = {
        "tensor": ((), (1,), (1, 1)),
        "channel": ((outputs,), (outputs, 1)),
        "block": ((-(-outputs // block[0]), -(-inputs // block[1])),) if block else (),
        "group": ((outputs, -(-inputs // group)),),
    }
    said = scheme.strategy if scheme is not None else None
    possible = [said] if said is not None else ["tensor", "channel"]
    found = next((name for name in possible if scales.shape in shapes[name]), None)
    if found is None:
        expected = [list(each) for name in possible for each in shapes[name]]
        raise layer.wrong(
            f"has scales of shape {scales.shape}, expected {' or '.join(map(str, expected))} for a matrix {list(shape)}"
        )
    return found


def _nibbles(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """``u8`` codes along an axis, of which a word holds 32 / bits, the first in its lowest bits."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (np.expand_dims(words, -1) >> shifts).astype(np.uint8) & np.uint8((1 << bits) - 1)
    codes = np.moveaxis(codes, -1, axis + 1)
    shape = list(words.shape)
    shape[axis] *= len(shifts)
    return codes.reshape(shape)


def _of_packed(layer: _Layer, scheme: Scheme, shape: tuple[int, ...]) -> Grouped:
    """compressed-tensors' pack-quantized: codes along the inputs, zero points along the outputs."""
    if len(shape) != 2 or min(shape) < 1 or shape[1] % 8:
        raise layer.wrong(f"has a weight_shape of {shape}, expected outputs and a multiple of 8 inputs")
    (outputs, inputs), bits, per_word = shape, scheme.bits, 32 // scheme.bits
    codes = _nibbles(layer.words("weight_packed", (outputs, -(-inputs // per_word))), bits, 1)[:, :inputs]
    scales, middle = layer.floats("weight_scale"), 1 << (bits - 1)
    _strategy(layer, scales, scheme, (outputs, inputs))
    size = (scheme.group or inputs) if scheme.strategy == "group" else inputs
    block = (outputs if scheme.strategy == "tensor" else 1, size)
    blocks = -(-outputs // block[0]), -(-inputs // block[1])
    zeros = np.full((1, 1), middle, np.int16)
    if "weight_zero_point" in layer.names:
        found = layer.read("weight_zero_point")
        if found.dtype == np.int8:
            zeros = found.reshape(blocks).astype(np.int16) + middle if found.size == blocks[0] * blocks[1] else found
        else:
            words = layer.words("weight_zero_point", (-(-blocks[0] // per_word), blocks[1]))
            zeros = _nibbles(words, bits, 0)[: blocks[0]].astype(np.int16)
    elif not scheme.symmetric:
        raise layer.wrong("is asymmetric by its config, but has no weight_zero_point")
    made = Grouped(axis=1, codes=codes, scales=_shaped(layer, scales, blocks), zeros=zeros, block=block)
    if "weight_g_idx" in layer.names and (layer.read("weight_g_idx") >= 0).all():
        made = _in_order(layer, made, layer.read("weight_g_idx"))
    return replace(made, codes=in_bits(made.codes, bits, axis=1))


def _of_gptq(layer: _Layer, scheme: Scheme, shape: tuple[int, ...], *, older: bool) -> Grouped:
    """GPTQ: codes along the inputs, zero points along the outputs, of the first version less one."""
    (outputs, inputs), bits, per_word = shape, scheme.bits, 32 // scheme.bits
    size = scheme.group or inputs
    groups = -(-inputs // size)
    codes = _nibbles(layer.words("qweight", (inputs // per_word, outputs)), bits, 0).T
    zeros = _nibbles(layer.words("qzeros", (groups, outputs // per_word)), bits, 1).T.astype(np.int16) + int(older)
    scales = layer.floats("scales").T
    if scales.shape != (outputs, groups):
        raise layer.wrong(f"has scales of shape {scales.T.shape}, expected {(groups, outputs)}")
    made = Grouped(axis=1, codes=codes, scales=scales, zeros=zeros, block=(1, size))
    if "g_idx" in layer.names:
        made = _in_order(layer, made, layer.read("g_idx"))
    return replace(made, codes=in_bits(made.codes, bits, axis=1))


def _of_awq(layer: _Layer, scheme: Scheme, shape: tuple[int, ...]) -> Grouped:
    """AWQ's "gemm": codes and zero points along the outputs, 8 of them to a word in an order of its own."""
    outputs, inputs = shape
    size = scheme.group or inputs
    groups = -(-inputs // size)

    def unpacked(part: str, rows: int) -> np.ndarray:
        found = _nibbles(layer.words(part, (rows, outputs // 8)), 4, 1)
        return found.reshape(rows, -1, 8)[:, :, _AWQ_COLUMNS].reshape(rows, outputs).T

    scales = layer.floats("scales").T
    if scales.shape != (outputs, groups):
        raise layer.wrong(f"has scales of shape {scales.T.shape}, expected {(groups, outputs)}")
    codes, zeros = in_bits(unpacked("qweight", inputs), 4, axis=1), unpacked("qzeros", groups).astype(np.int16)
    return Grouped(axis=1, codes=codes, scales=scales, zeros=zeros, block=(1, size))


def _in_order(layer: _Layer, made: Grouped, groups: np.ndarray) -> Grouped:
    """With codes that belong to one group side by side, where ``groups`` says of each input to which it belongs."""
    inputs, size = made.shape[1], made.block[1]
    if groups.shape != (inputs,) or groups.dtype.kind not in "iu":
        raise layer.wrong(f"has a g_idx of {groups.dtype}{list(groups.shape)}, expected {inputs} whole numbers")
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], np.arange(inputs) // size):
        raise layer.wrong(f"has a g_idx whose groups aren't of {size} inputs each, expected as its config says")
    if np.array_equal(order, np.arange(inputs)):
        return made
    return replace(made, codes=made.codes[:, order], order=order)
