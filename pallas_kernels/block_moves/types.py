"""What ``move_kvs`` is given."""

from dataclasses import dataclass

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Moves:
    """Per row (a KV head of a layer of a sequence) the KVs to move; sources and destinations are disjoint.

    The ``m``-th move of a row takes the KV of its ``m``-th source to its ``m``-th hole. A row's sources lie in blocks
    that come after those of its holes: they are an eviction's survivors, in the blocks that are given up.
    """

    is_source: Array
    """``bool[rows, kvs]``, in table order."""
    is_hole: Array
    """``bool[rows, kvs]``; as many in each row as sources."""
