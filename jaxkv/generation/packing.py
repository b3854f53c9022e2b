"""Several sequences' tokens one after the other in one row, so that none is padded to the longest."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from models.interface import Attend, State


class Packing:
    """Between tokens that lie one after the other, ``[1, tokens]``, as the model's products take them, and a row for
    each sequence, ``[rows, length]``, as attention does.

    Args:
      counts: ``i32[rows]`` tokens of each row, in their order.
      tokens: of all; static, and at least the sum of counts.
      length: most tokens of a row; static.
    """

    def __init__(self, counts: Array, tokens: int, length: int):
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        first, at = ends - counts, jnp.arange(tokens, dtype=jnp.int32)
        self._source = jnp.minimum(first[:, None] + jnp.arange(length, dtype=jnp.int32), tokens - 1)
        row = jnp.searchsorted(ends, at, side="right").astype(jnp.int32)
        self._row = jnp.minimum(row, counts.shape[0] - 1)
        self._place = jnp.clip(at - first[self._row], 0, length - 1)

    def unpack(self, packed: Array) -> Array:
        """``[1, tokens, ...]`` as ``[rows, length, ...]``; past a row's count stands something."""
        return packed[0][self._source]

    def pack(self, rows: Array) -> Array:
        """``[rows, length, ...]`` as ``[1, tokens, ...]``; past the last token stands something."""
        return rows[self._row, self._place][None]

    def attend(self, attend: Attend[State]) -> Attend[State]:
        """Attention over rows, for a model that is given packed tokens."""

        def packed(state: State, layer: int | Array, query: Array, key: Array, value: Array) -> tuple[State, Array]:
            state, out = attend(state, layer, *map(self.unpack, (query, key, value)))
            return state, self.pack(out)

        return packed
