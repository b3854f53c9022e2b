"""What a GGUF file holds: its metadata by key and its tensors by name, over the mapped file.

gguf's own reader makes several NumPy views for every string, which takes seconds for a vocabulary.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Iterable
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
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


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
        """Maps the file and reads its header; where it is the first part of a split model, all parts of it.

        Raises:
          CheckpointError: a file can't be read, isn't a GGUF, is damaged, or is a later part of a split model.
        """
        self.path = path
        self._raw, self.tensors = _mapped(path)
        if self._raw.get(_COUNT, 1) != 1:
            self._add_parts()

    def _add_parts(self) -> None:
        count, number = self._raw[_COUNT], self._raw.get(_NUMBER)
        name = _PART.search(self.path.name)
        if type(count) is not int or not 1 < count < 100_000 or type(number) is not int or not 0 <= number < count:
            raise _wrong_part(self.path, f"it says that it is part {number!r} of {count!r}")
        if name is None or int(name[2]) != count or int(name[1]) != number + 1:
            raise _wrong_part(
                self.path, f"it is part {number + 1} of {count}, expected a name that ends in {_ending(number, count)}"
            )
        beside = [self.path.with_name(self.path.name[: name.start()] + _ending(i, count)) for i in range(count)]
        if number:
            raise CheckpointError(f"{self.path} is part {number + 1} of a model. Give the first, {beside[0].name}.")
        if missing := [part.name for part in beside if not part.exists()]:
            raise CheckpointError(f"{self.path} needs {missing[0]}, which isn't beside it. Download the model's parts.")
        for i, part in enumerate(beside[1:], 1):
            raw, tensors = _mapped(part)
            if (raw.get(_NUMBER), raw.get(_COUNT)) != (i, count):
                raise _wrong_part(part, f"it says that it is part {raw.get(_NUMBER)!r} of {raw.get(_COUNT)!r}")
            if twice := sorted(tensors.keys() & self.tensors.keys()):
                raise _wrong_part(part, f"an earlier part has tensor {twice[0]!r} too")
            self.tensors |= tensors
        if (expected := self._raw.get(_TENSORS, len(self.tensors))) != len(self.tensors):
            raise _wrong_part(self.path, f"all parts have {len(self.tensors)} tensors, expected {expected!r}")

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


def ggufs_in(directory: Path) -> list[Path]:
    """The GGUF files there; of a split model, the first part."""
    return [directory / name for name in first_parts(path.name for path in directory.glob("*.gguf"))]


def first_parts(names: Iterable[str]) -> list[str]:
    """Those that are GGUF files, in order; of a split model, the first part."""
    parts = {name: _PART.search(name) for name in sorted(names) if name.endswith(".gguf")}
    return [name for name, part in parts.items() if part is None or int(part[1]) == 1]


def all_parts(name: str) -> str:
    """A pattern of the names of a model's parts, of which one is given; a name that is no part's as it is."""
    return _PART.sub(r"-?????-of-\2.gguf", name)


def _ending(number: int, count: int) -> str:
    """Of the name of a part, counted from 0."""
    return f"-{number + 1:05}-of-{count:05}.gguf"


def _wrong_part(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is one of a model's parts, but {what}. Download all parts again.")


def _mapped(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors of one file."""
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
        return _read(mapped)
    except Exception as error:  # damage surfaces as whatever the arithmetic on its lengths meets
        raise CheckpointError(
            f"{path} ({len(mapped)} bytes) is cut short or damaged, expected a whole GGUF file ({error}). "
            "Download it again."
        ) from error


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
