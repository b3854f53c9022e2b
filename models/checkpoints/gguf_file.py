"""What a GGUF file holds: its metadata by key and its tensors by name, over the mapped file.

gguf's own reader makes several NumPy views for every string, which takes seconds for a vocabulary.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import quant_shape_to_byte_shape

from models.errors import CheckpointError

_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_ALIGNMENT = 32  # of the tensors' data, where the metadata names no other
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor, as stored."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Row-major: ``[out, in]`` for a linear layer."""
    data: np.ndarray
    """``u8[..., bytes of a row]``, mapped."""


class GgufFile:
    """Keys and names in the file's order; values are decoded when they are asked for."""

    def __init__(self, path: Path):
        """Maps the file and reads its header.

        Raises:
          CheckpointError: it can't be read, isn't a GGUF, or is damaged.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                magic = file.read(4)
                if magic != b"GGUF":
                    raise CheckpointError(
                        f"{path} begins with {magic!r}, expected b'GGUF'. It isn't a GGUF file; download it again."
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"can't read {path}: {error.strerror}. Give the path of a GGUF file.") from error
        try:
            self._raw, self.tensors = _read(mapped)
        except Exception as error:  # damage surfaces as whatever the arithmetic on its lengths meets
            raise CheckpointError(
                f"{path} ({len(mapped)} bytes) is cut short or damaged, expected a whole GGUF file ({error}). "
                "Download it again."
            ) from error

    def metadata(self, wanted: Callable[[str], bool]) -> dict[str, Any]:
        """The wanted keys' values: numbers, strings, lists of them.

        Raises:
          CheckpointError: a string isn't UTF-8.
        """
        values = {}
        for key, raw in self._raw.items():
            if wanted(key):
                try:
                    values[key] = _decoded(raw)
                except UnicodeDecodeError as error:
                    raise CheckpointError(
                        f"{self.path}: {key} isn't text ({error}). The file is damaged; download it again."
                    ) from error
        return values


def _decoded(raw: Any) -> Any:
    if isinstance(raw, bytes):
        return raw.decode()
    if isinstance(raw, list):
        return [_decoded(item) for item in raw]
    return raw


class _Cursor:
    """Reads forward through the file, and never past its end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.place = 4  # after the magic

    def number(self, kind: GGUFValueType) -> Any:
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        values = np.frombuffer(self.data, _NUMBERS[kind], count, self.place) if count else np.empty(0)
        self.place += values.nbytes
        return values.tolist()

    def string(self) -> bytes:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[bytes]:
        found, place, data = [], self.place, self.data
        for _ in range(count):
            start = place + 8
            place = start + _LENGTH.unpack_from(data, place)[0]
            if place > len(data):
                raise ValueError(f"a string at byte {start} runs past the end")
            found.append(data[start:place])
        self.place = place
        return found

    def value(self, kind: GGUFValueType) -> Any:
        """A number, a string as bytes, or a list of either."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.number(kind)
        kind, count = GGUFValueType(self.number(GGUFValueType.UINT32)), self.number(GGUFValueType.UINT64)
        if kind == GGUFValueType.STRING:
            return self.strings(count)
        if kind == GGUFValueType.ARRAY:
            return [self.value(kind) for _ in range(count)]
        return self.numbers(kind, count)


def _read(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata, with strings as bytes, and tensors."""
    cursor = _Cursor(data)
    version = cursor.number(GGUFValueType.UINT32)
    if version not in (2, 3):
        raise ValueError(f"version {version:#x}, expected little-endian 2 or 3")
    num_tensors, num_keys = cursor.numbers(GGUFValueType.UINT64, 2)
    raw: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string().decode()
        if key in raw:
            raise ValueError(f"{key!r} comes twice")
        raw[key] = cursor.value(GGUFValueType(cursor.number(GGUFValueType.UINT32)))

    headers: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string().decode()
        if name in headers:
            raise ValueError(f"tensor {name!r} comes twice")
        shape = cursor.numbers(GGUFValueType.UINT64, cursor.number(GGUFValueType.UINT32))
        kind = GGMLQuantizationType(cursor.number(GGUFValueType.UINT32))
        headers[name] = tuple(reversed(shape)), kind, cursor.number(GGUFValueType.UINT64)

    alignment = raw.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment!r}, expected a power of two")
    start = -(-cursor.place // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in headers.items():
        width = quant_shape_to_byte_shape(shape, kind)
        stored = np.frombuffer(data, np.uint8, prod(width), start + offset).reshape(width)
        tensors[name] = GgufTensor(kind=kind, shape=shape, data=stored)
    return raw, tensors
