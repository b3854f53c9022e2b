"""Which implementation of an operation runs: the platform's own, one named in the call, or one named for a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
from jax import Array

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


def padded_head_dim(head_dim: int) -> int:
    """Values that K, and V, should take in a pool row, so that the implementation chosen here can read it.

    On a TPU a row is copied whole only where it fills registers of 128 lanes: K and V take a multiple of 64 each.
    """
    return -(-head_dim // 64) * 64 if choose(None).implementation == "mosaic_tpu" else head_dim


def default_block_size() -> int:
    """Token slots a block where nobody says otherwise.

    Small blocks lose less to part-filled ones, but each is a copy of its own, and a TPU's core takes 12 instructions to
    start one: 64 slots keep that below the time that the copy itself takes.
    """
    return 64 if choose(None).implementation == "mosaic_tpu" else 16


def check_row(pool: Array, head_dim: int) -> None:
    """Raises ValueError for pool rows that can't hold K beside V."""
    width = pool.shape[-1]
    if width % 2 or width < 2 * head_dim:
        raise ValueError(
            f"a pool row must hold K beside V, at least {2 * head_dim} values and an even number: "
            f"{pool.shape=}, {head_dim=}"
        )


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
