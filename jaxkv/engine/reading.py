"""The engine's note of a prompt that is being read, and how it is cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.generation.prefill import PromptState


@dataclass(kw_only=True)
class Prompt:
    """One that is being read."""

    row: int
    part: int
    """Tokens of a part."""
    chunk: int
    """Tokens of a chunk, the last one padded: one program serves all."""
    peak: int
    """Blocks that it takes from the pool in all."""
    state: PromptState
    """Of its present part."""
    read: int
    """Tokens, borrowed ones included."""
    borrowed: int
    """Blocks of a prefix that it began with."""
    lend: int
    """Tokens that become a prefix once they are read; 0: none do."""
    compressed: np.ndarray
    """Blocks that it takes when it is compressed, as ``jaxkv.engine.block_counts`` counts."""


def chunk_of(ids: np.ndarray, size: int) -> tuple[jax.Array, int]:
    """The first of these tokens, ``i32[1, size]``, and how many are real."""
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(ids[:size])] = ids[:size]
    return jnp.asarray(tokens), len(ids[:size])
