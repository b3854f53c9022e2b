"""Codes with scales as named arrays and a description in JSON, and back: for checkpoints of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from models.errors import CheckpointError
from models.quantised import Grouped, Packed, Quantised, Scaled

_FORMS = {form.__name__: form for form in (Scaled, Grouped, Packed)}


def describe(value: Any) -> dict[str, Any] | None:
    """All but the arrays; of an array: None."""
    if not isinstance(value, Quantised | Packed):
        return None
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    fixed = {name: parts.pop(name) for name in _fixed(type(value))}
    arrays = {name: describe(part) for name, part in parts.items() if part is not None}
    return {"form": type(value).__name__, **fixed, "arrays": arrays}


def arrays_of(name: str, value: Any) -> dict[str, Any]:
    """By their names, which begin with ``name``."""
    if not isinstance(value, Quantised | Packed):
        return {name: value}
    found: dict[str, Any] = {}
    for field in fields(value):
        if field.name not in _fixed(type(value)) and (part := getattr(value, field.name)) is not None:
            found |= arrays_of(f"{name}.{field.name}", part)
    return found


def rebuild(name: str, description: Any, arrays: Mapping[str, Any]) -> Any:
    """What ``describe`` described.

    Raises:
      CheckpointError: the description isn't one that it gave, or an array is missing.
    """
    if description is None:
        if name not in arrays:
            raise CheckpointError(f"{name!r} is missing. Save the model again.")
        return arrays[name]
    try:
        form = _FORMS[description["form"]]
        fixed = {key: _whole_numbers(description[key]) for key in _fixed(form)}
        parts = {key: rebuild(f"{name}.{key}", part, arrays) for key, part in description["arrays"].items()}
        made = form(**fixed, **parts)
        if made.axis not in (0, 1) or min(fixed.get("block", (1, 1))) < 1 or len(fixed.get("block", (1, 1))) != 2:
            raise ValueError("impossible numbers")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{name!r} is described as {str(description)[:60]!r}, which `save` didn't write. Save the model again."
        ) from error
    return made


def _fixed(form: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(form) if field.metadata.get("static"))


def _whole_numbers(value: Any) -> Any:
    """An int, or a tuple of two, as JSON has them."""
    found = value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in found):
        raise ValueError("no whole number")
    return tuple(found) if isinstance(value, list) else value
