"""Values as users give them: checked before they are used, and shown in errors without filling the page."""

from __future__ import annotations

import json
import reprlib
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from jaxkv.words import DTYPES

LONGEST = 60
"""Characters of a value in an error."""
KINDS = {
    "int": ("a whole number", int, Integral),
    "float": ("a number", float, Real),
    "bool": ("true or false", bool, bool | np.bool_),
}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlist = _short.maxtuple = LONGEST


def shown(value: object) -> str:
    """A value as Python writes it, cut before it is written: neither a text of megabytes nor ``10**5000`` is."""
    if isinstance(value, int) and abs(value) >= 10**LONGEST:
        return f"a number of {value.bit_length()} bits"
    return cut(_short.repr(value))


def shown_json(value: Any) -> str:
    """A value as JSON writes it, of which no more is written than is shown."""
    text = ""
    for part in json.JSONEncoder().iterencode(value[: LONGEST + 1] if isinstance(value, str) else value):
        text += part
        if len(text) > LONGEST:
            break
    return cut(text)


def cut(text: str, most: int = LONGEST) -> str:
    """A text, not longer than that."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def number(value: Any, name: str, kind: str = "int") -> Any:
    """The value as Python's own number of a kind, ``int``, ``float`` or ``bool``; numpy's are taken.

    Raises:
      ValueError: it is none.
    """
    expected, python, accepted = KINDS[kind]
    if isinstance(value, bool | np.bool_) != (kind == "bool") or not isinstance(value, accepted):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    return value if type(value) in (int, float, bool) else python(value)


def check_numbers(record: Any, **names: str) -> None:
    """Checks the numbers of a frozen dataclass by what its fields are annotated with, and makes them Python's own.

    Args:
      record: fields annotated otherwise than ``int``, ``float`` or ``bool``, ``| None`` or not, are left alone.
      names: what users call a field, where that isn't its name.

    Raises:
      ValueError: a value of another type.
    """
    for each in fields(record):
        kind, _, optional = getattr(each.type, "__name__", str(each.type)).partition(" | ")
        value = getattr(record, each.name, None)
        if kind in KINDS and optional in ("", "None") and not (optional and value is None):
            checked = number(value, names.get(each.name, each.name), kind)
            object.__setattr__(record, each.name, checked)  # the one way into a frozen dataclass


def check_dtypes(**given: DTypeLike | None) -> None:
    """``check_dtype`` of those that are given, by their names."""
    for name, dtype in given.items():
        if dtype is not None:
            check_dtype(dtype, name)


def check_dtype(dtype: DTypeLike, name: str) -> None:
    """Raises ValueError for a dtype that is none of ``DTYPES``: whole numbers would cut weights, keys and values off,
    and JAX makes other floats of some without a word."""
    try:
        known = np.dtype(dtype).name in DTYPES
    except TypeError:
        known = False
    if not known or dtype is None:  # None is float64 to numpy
        raise ValueError(f"{name} must be {' or '.join(DTYPES)}, got {shown(dtype)}")
