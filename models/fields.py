"""Typed reading of a checkpoint's untrusted key-value metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import CheckpointError


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a checkpoint's file, all of whose texts are Unicode.

    Raises:
      CheckpointError: the file can't be read, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # an escape may be half a surrogate pair
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}. Use a complete checkpoint.") from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path} has half a surrogate pair in a text ({error}). Download it again.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} isn't JSON that can be read: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object. Download it again.")
    return value


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A mapping whose values are checked as they are read; a null value counts as absent.

    Every method raises ``CheckpointError`` where the value has the wrong type, or is absent and has no default.
    """

    origin: str
    """What the mapping came from, for messages: "config.json", "GGUF metadata"."""
    values: Mapping[str, object]

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not _is_finite(value):
            raise self._wrong(key, "a finite number")
        return float(value)  # pyright: ignore[reportArgumentType]

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def choice(self, key: str, expected: Sequence[str]) -> str:
        """One of the expected kinds of model."""
        value = self.text(key, "")
        if value not in expected:
            raise CheckpointError(
                f"{self.origin}: {key} is {value!r:.60}, expected one of {', '.join(expected)}. Only models of these "
                "kinds are supported."
            )
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty where absent."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        ids = tuple(item for item in found if isinstance(item, int) and not isinstance(item, bool))
        if len(ids) < len(found):
            raise self._wrong(key, "a token id or a list of token ids")
        return ids

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty where absent."""
        value = self.values.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self._wrong(key, "a list of strings")
        return value or []

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self._value(key, None)
        found = value if isinstance(value, list) else []
        numbers = tuple(float(item) for item in found if _is_finite(item))
        if not found or len(numbers) < len(found):
            raise self._wrong(key, "a list of finite numbers")
        return numbers

    def sections(self, key: str) -> list[dict]:
        """A list of mappings; empty where absent."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        mappings = [item for item in found if isinstance(item, dict)]
        if len(mappings) < len(found):
            raise self._wrong(key, "a list of objects")
        return mappings

    def section(self, key: str) -> Fields:
        """The mapping nested under ``key``; empty where absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Fields(origin=f"{self.origin}: {key}", values=value or {})

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.origin} has no {key!r}, which its model needs. Use a complete checkpoint.")
        return default

    def _wrong(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.origin}: {key} is {_shown(self.values.get(key))}, expected {expected}. "
            "The file is damaged or not of a model of its kind; download it again."
        )


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float can be."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _shown(value: object) -> str:
    """Not longer than a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
