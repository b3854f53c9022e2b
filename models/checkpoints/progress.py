"""Parameters one by one onto the device, with a bar where that takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
from tqdm import tqdm

Key = TypeVar("Key")
LONG = 2.0
"""Seconds after which a bar is drawn."""


def one_by_one(parameters: Iterable[tuple[Key, Any, int]], total: int) -> Iterator[tuple[Key, Any]]:
    """Keys and variables, each of which is set before the next is asked for, and is then on the device.

    So the host holds one at a time, however slow the way to the device. On a terminal a load that takes long draws a
    bar on standard error, with the bytes a second.

    Args:
      parameters: keys, variables and the bytes that are read for them.
      total: of these bytes.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    with tqdm(
        total=total,
        desc="loading",
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        delay=LONG,
        leave=False,
        disable=not terminal,
        dynamic_ncols=True,
    ) as bar:
        for key, variable, size in parameters:
            yield key, variable
            jax.block_until_ready(variable.get_value())
            bar.update(size)
