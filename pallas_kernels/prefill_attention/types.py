"""What ``prefill_attention`` is given."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ObservedQueries:
    """Which queries of the chunk are observed, and what becomes of their attention probabilities.

    A key gets the sum, over the observed queries, of ``function(probability)``, for each query head apart: what joins
    the query heads of a KV head (and max-pooling before that) is the policy's affair.
    """

    rows: Array
    """``i32[batch, observed]`` indices into the chunk; -1 where there is none."""
    positions: Array
    """``i32[batch, length]`` position in the text of each query, which is also that of its own key."""
    cached_positions: Array
    """``i32[batch, kv_heads, max_blocks * block_size]`` positions of the cached keys, in table order."""
    function: Callable[[Array], Array] = field(metadata={"static": True})
    buffer: int = field(default=0, metadata={"static": True})
    """A query tells nothing of keys less than so many tokens before it (KV-Compress, section 3, ``v``)."""
