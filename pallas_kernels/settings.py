"""What is traced here is traced under settings of its own, whatever a program says of JAX for its own code."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def any_ranks(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same, also where ``jax_numpy_rank_promotion`` is ``"raise"`` or ``"warn"``."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return run


def operation(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same, with ``any_ranks``, and also under ``jax_enable_x64``: kernels know no numbers of 64 bits, as which
    Python's would be taken, and given ones are narrowed."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        args, kwargs = jax.tree.map(_narrow, (args, kwargs))
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return any_ranks(run)


def _narrow(x: Any) -> Any:
    wide = isinstance(x, Array) and x.dtype.itemsize == 8
    return x.astype(jnp.dtype(f"{x.dtype.kind}4")) if wide else x
