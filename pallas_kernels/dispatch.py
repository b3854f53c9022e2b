"""Which implementation of an operation runs: the platform's own, one named in the call, or one named for a block."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import Array

Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu"]
"""``"xla"``: the reference in plain XLA, on any platform. The others are Pallas kernels: ``"mosaic_tpu"`` for TPUs,
``"mosaic_gpu"`` for NVIDIA Hopper GPUs: H100, H200, GH200."""
MODULES: dict[Implementation, str] = {"xla": "xla", "mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}
HOPPER = "9."
"""How the compute capability of a GPU begins that has what the kernels use: later ones have no ``wgmma``."""


class Choice(NamedTuple):
    """An implementation and how to interpret it where its platform isn't at hand."""

    implementation: Implementation
    interpret: Any = False
    by_platform: bool = False
    """Nobody named it."""


_forced: ContextVar[Choice | None] = ContextVar("implementation", default=None)


@contextmanager
def use_implementation(implementation: Implementation, *, interpret: Any = False) -> Iterator[None]:
    """Everything traced inside takes this implementation, unless a call names another.

    For compiling ahead of time for a platform that isn't here, and for running its kernels in an interpreter. It acts
    when a program is traced, so a program that ``jax.jit`` has already traced keeps what it has.

    Args:
      implementation: see ``Implementation``.
      interpret: False, True, ``pltpu.InterpretParams``, or for GPUs ``plgpu.InterpretGPUParams``.
    """
    token = _forced.set(Choice(implementation, interpret))
    try:
        yield
    finally:
        _forced.reset(token)


def padded_head_dim(head_dim: int) -> int:
    """Values that K, and V, should take in a pool row, so that the implementation chosen here can read it.

    On a TPU a row is copied whole only where it fills registers of 128 lanes: K and V take a multiple of 64 each. The
    GPU kernels take 64 or 128.
    """
    padded = -(-head_dim // 64) * 64
    most = {"xla": 0, "mosaic_tpu": padded, "mosaic_gpu": 128}[choose(None).implementation]
    return padded if padded <= most else head_dim


def default_block_size() -> int:
    """Token slots a block where nobody says otherwise.

    Small blocks lose less to part-filled ones, but each is a copy of its own, and a TPU's core takes 12 instructions to
    start one: 64 slots keep that below the time that the copy itself takes.
    """
    return 64 if choose(None).implementation == "mosaic_tpu" else 16


def block_tile() -> int:
    """Rows that those of a quantised block should be a multiple of: ``BlockLayout.tile``."""
    return 8 if choose(None).implementation == "mosaic_tpu" else 1


def block_low_step(head_dim: int) -> int:
    """Tokens that a quantised block's low ones should be a multiple of: ``BlockLayout.low_step``.

    A TPU wants whole rows of 128 lanes on each side of a block, a GPU whole tiles of 64.
    """
    return {"xla": 1, "mosaic_tpu": 256 if head_dim == 64 else 128, "mosaic_gpu": 64}[choose(None).implementation]


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
    known = get_args(Implementation)
    if implementation not in (None, *known):
        raise ValueError(f"unknown {implementation=}; expected one of {known}, or None for the platform's own")
    forced = _forced.get()
    if forced is not None and implementation in (None, forced.implementation):
        return forced
    return Choice(implementation) if implementation else Choice(of_platform(), by_platform=True)


def of_platform() -> Implementation:
    """What the default device runs best. A GPU without kernels of ours takes the reference, which is said once."""
    platform = jax.default_backend()
    if platform == "gpu":
        device = jax.devices()[0]
        if str(getattr(device, "compute_capability", "")).startswith(HOPPER):  # of AMD's it is a name
            return "mosaic_gpu"
        say_once(f"{device.device_kind} is no NVIDIA Hopper GPU, so jaxkv's operations run as plain XLA there")
    return "mosaic_tpu" if platform == "tpu" else "xla"


def backend(
    operation: str, implementation: Implementation | None, *checked: Any, part: str = ""
) -> tuple[ModuleType, dict[str, Any]]:
    """The module that has an operation's kernels, and what else they take.

    A platform's Pallas is imported here, when it is chosen, and nowhere else: it may not be importable on another.

    Args:
      operation: its folder.
      implementation: as for ``choose``.
      checked: what the ``check`` of the kernels' modules takes.
      part: how the modules' names end, where an operation has several of each.

    Raises:
      ValueError: the kernels can't take it; or, of a GPU whose kernels nobody named, the reference runs, which is said
        once.
    """
    choice = choose(implementation)

    def module_of(implementation: Implementation) -> ModuleType:
        return import_module(f"pallas_kernels.{operation}.{MODULES[implementation]}{part}")

    module = module_of(choice.implementation)
    if choice.implementation == "xla":
        return module, {}
    try:
        module.check(*checked)
    except ValueError as refusal:
        if choice.implementation == "mosaic_tpu" or not choice.by_platform:
            raise
        say_once(f"an operation runs as plain XLA on this GPU: {refusal}")
        return module_of("xla"), {}
    return module, {"interpret": choice.interpret}


@cache
def say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
