"""Broadcasting between arrays of different ranks, whatever the caller has JAX do about it in code of its own."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def any_ranks(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same, also in a program that sets ``jax_numpy_rank_promotion`` to ``"raise"`` or ``"warn"``."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return run
