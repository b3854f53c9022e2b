"""Typed reading of a checkpoint's untrusted key-value metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.errors import CheckpointError


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
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, "a finite number")
        return float(value)

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
        numbers = tuple(float(item) for item in found if isinstance(item, int | float) and math.isfinite(item))
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


def _shown(value: object) -> str:
    """Not longer than a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
