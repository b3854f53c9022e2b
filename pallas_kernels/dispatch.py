"""Which implementation of an operation runs: the platform's own, one named in the call, or one named for a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax

Implementation = Literal["xla", "mosaic_tpu"]
"""``"xla"``: the reference in plain XLA, on any platform. ``"mosaic_tpu"``: the Pallas kernel for TPUs."""

OF_PLATFORM: dict[str, Implementation] = {"tpu": "mosaic_tpu"}


class Choice(NamedTuple):
    """An implementation and how to interpret it where its platform isn't at hand."""

    implementation: Implementation
    interpret: Any = False


_forced: ContextVar[Choice | None] = ContextVar("implementation", default=None)


@contextmanager
def use_implementation(implementation: Implementation, *, interpret: Any = False) -> Iterator[None]:
    """Everything traced inside takes this implementation, unless a call names another.

    For compiling ahead of time for a platform that isn't here, and for running its kernels in an interpreter. It acts
    when a program is traced, so a program that ``jax.jit`` has already traced keeps what it has.

    Args:
      implementation: see ``Implementation``.
      interpret: what ``pl.pallas_call`` takes: False, True or ``pltpu.InterpretParams``.
    """
    token = _forced.set(Choice(implementation, interpret))
    try:
        yield
    finally:
        _forced.reset(token)


def choose(implementation: Implementation | None) -> Choice:
    """The implementation that a call takes: the one it names, else the block's, else the platform's.

    Raises:
      ValueError: an unknown name.
    """
    known = Implementation.__args__
    if implementation not in (None, *known):
        raise ValueError(f"unknown {implementation=}; expected one of {known}, or None for the platform's own")
    forced = _forced.get()
    if forced is not None and implementation in (None, forced.implementation):
        return forced
    return Choice(implementation or OF_PLATFORM.get(jax.default_backend(), "xla"))
