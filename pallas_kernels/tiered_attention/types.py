"""What ``tiered_attention`` is given and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax import Array


@dataclass(frozen=True)
class Significance:
    """What attention tells of the quantised KVs; runs inside the kernel."""

    observe: Callable[[Array], Array]
    """Probabilities ``[..., group, kvs]`` to what each KV's score gains, ``[..., kvs]``."""
    value: Callable[[Array, Array, Array], Array]
    """Scores, positions ``[..., kvs]`` and the next token's position ``[..., 1]`` to how much a KV is worth, infinite
    where it must stay."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Weakest:
    """The KV of each head and tier that is worth least; of equals, the first."""

    value: Array
    """``f32[2, batch, kv_heads]``, high and low tier; infinite where none may go."""
    index: Array
    """``i32[2, batch, kv_heads]`` within the head's tier."""


class Tiered(NamedTuple):
    """What ``tiered_attention`` gives."""

    output: Array
    """``[batch, heads, head_dim]``."""
    pool: Array
    """With the scores that were added to."""
    weakest: Weakest | None
