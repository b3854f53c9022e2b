"""What ``paged_attention`` is given and gives, beside ``RawKVs``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantised_block import BlockLayout

Observe = Callable[[Array], Array]
"""Turns probabilities ``[..., group, kvs]`` into one value a KV, ``[..., kvs]``; runs inside the kernel."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TieredKVs:
    """Quantised KVs of two tiers that each head of each sequence holds."""

    pool: Array
    """``u32[blocks, rows, 128]``, blocks of ``layout``."""
    block_table: Array
    """``i32[batch, kv_heads, max_blocks]``: a head's high blocks from the left, its low ones from the right; what lies
    between is never read."""
    lengths: Array
    """``i32[batch, kv_heads, 2]`` KVs in the high and in the low tier."""
    layout: BlockLayout = field(metadata={"static": True})


@dataclass(frozen=True)
class Significance:
    """What attention tells of the quantised KVs; runs inside the kernel."""

    observe: Observe
    """Probabilities to what each KV's score gains."""
    value: Callable[[Array, Array, Array], Array]
    """Scores, positions ``[..., kvs]`` and the next token's position ``[..., 1]`` to how much a KV is worth, infinite
    where it must stay."""

    @classmethod
    def of_scores(cls, observe: Observe) -> "Significance":
        """That adds to scores and asks for nothing weakest."""
        return cls(observe, _must_stay)


def _must_stay(scores: Array, positions: Array, next_position: Array) -> Array:
    return jnp.full_like(scores, jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Weakest:
    """The KV of each head and tier that is worth least; of equals, the first."""

    value: Array
    """``f32[batch, kv_heads, 2]``, high and low tier; infinite where none may go."""
    index: Array
    """``i32[batch, kv_heads, 2]`` within the head's tier."""


class Significant(NamedTuple):
    """What a ``Significance`` comes to."""

    pool: Array
    """The tiers', with the scores that were added to."""
    weakest: Weakest


class Observed(NamedTuple):
    """What an ``Observe`` comes to of unquantised and quantised KVs in one softmax."""

    masses: Array
    """``f32[batch, kv_heads, kvs]`` of the unquantised ones in table order; past a head's length they mean nothing."""
    pool: Array
    """The tiers', with the scores that were added to."""
