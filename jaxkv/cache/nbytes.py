"""Bytes of arrays, whether they are there or only their shapes are."""

from typing import Any

import jax


def nbytes(tree: Any) -> int:
    """Of all arrays of a pytree, or of their ``jax.ShapeDtypeStruct``s."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
